"""The papers' claims, reproduced by `launch/reproduce NAME`: one module an experiment."""
