"""The commands of `flowlm`: a file for each kind of command, and what all of them share.

command.py says what a command is and reads its line, help.py shows it, mistakes.py names what was meant in place of a mistake, and
commands.py lists them all. Here nothing is computed: a command reads its flags and calls the library. The library is imported where
it is called, because it takes seconds, for which neither help nor a mistyped flag should wait.
"""
