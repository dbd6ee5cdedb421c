"""The command line: ``main.py`` and one file for each command; parsing and printing only.

A command is a module here with ``HELP`` (one line), ``add_parser(subparsers)`` and
``run(args) -> int``; it is found by being here. Imports of torch and the rest of sparseft belong
inside ``run``, so that ``sparseft --help`` answers at once. Names starting with ``_`` are shared
helpers.
"""
