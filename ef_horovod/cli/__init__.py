"""The command `ef-horovod`: one file a subcommand."""
