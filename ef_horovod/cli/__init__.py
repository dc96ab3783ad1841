"""The command `ef-horovod`: one file per subcommand."""
