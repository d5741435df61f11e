"""The commands of `flowlm`: a file for each kind of command, and what all of them share.

command.py says what a command is and reads its line, help.py prints its help, mistakes.py says what a mistake was meant to be, and
commands.py lists all commands. Nothing is computed in this room: a command reads its flags and calls the library. The library is
imported where it is called, because it takes seconds, for which neither help nor a mistyped flag should wait.
"""
