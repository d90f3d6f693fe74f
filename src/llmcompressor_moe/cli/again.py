"""The command that runs again what runs now."""

import shlex
from typing import Any

import click

__all__ = ["command_line"]


def command_line(context: click.Context, **changes: Any) -> str:
    """A command as it can be typed, with all options that differ from their defaults.

    :param changes: parameters that get another value
    """
    words = context.command_path.split()
    values = {**context.params, **changes}
    for parameter in context.command.params:
        value = values.get(parameter.name)
        if value is None or value == parameter.get_default(context):
            continue
        option = parameter.param_type_name == "option"
        if option:
            words.append(max(parameter.opts, key=len))
        if not (option and parameter.is_flag):
            words.append(str(value))
    return shlex.join(words)
