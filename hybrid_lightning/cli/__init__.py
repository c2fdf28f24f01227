"""The command line: `main.py` has its commands.

parser.py            options, in configs and on the command line, and errors in them
switches.py          options that another class brings with it
help.py              `--help`
remedies.py          what to do about an error
shipped_configs.py   configs of the package, by name
"""
