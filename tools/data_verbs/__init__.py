"""The verbs of tools/data.py, one module each: add_arguments(parser) and run(options) -> exit code."""
