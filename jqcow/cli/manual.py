"""Man pages, and completion for bash, made of the parsers when a wheel is built.

``python -m jqcow.cli.manual DIRECTORY`` writes them below a directory, as ``/usr/share`` has them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jqcow._version import __version__
from jqcow.cli import main, recover
from jqcow.cli.profile import QEMU_IMG

MAN = "man/man1"
BASH = "bash-completion/completions/jqcow"

Action = argparse.Action


def files() -> dict[str, str]:
    """Return all files by their place below ``share``."""
    pages = {f"{MAN}/{name}.1": page for name, page in man_pages()}
    return {**pages, BASH: bash_completion()}


def write_below(directory: Path) -> list[str]:
    """Write all files below a directory; return their places in it."""
    made = files()
    for place, text in made.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(made)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


# Man pages


def man_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each page."""
    whole = main.build_parser()
    commands = commands_of(whole)
    helps = _helps_of(whole)
    yield "jqcow", _page("jqcow", "images whose metadata changes are transactions", whole, commands)
    for name, parser in commands.items():
        yield f"jqcow-{name}", _page(f"jqcow-{name}", helps[name], parser)
    like = main.build_parser(QEMU_IMG)
    yield "jqcow-img", _page("jqcow-img", "jqcow with the defaults of qemu-img", like, commands_of(like))
    told = "bring a crashed image home, or save what can be had back of a damaged one"
    yield "jqcow-recover", _page("jqcow-recover", told, recover.build_parser())


def _helps_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {one.dest: one.help or "" for one in action._choices_actions}
    return found


def _page(
    name: str,
    told: str,
    parser: argparse.ArgumentParser,
    commands: dict[str, argparse.ArgumentParser] | None = None,
) -> str:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = [f'.TH {_roff(name.upper())} 1 "" "jqcow {__version__}" "User Commands"']
    lines += [".SH NAME", _roff(f"{name} - {told}"), ".SH SYNOPSIS", ".nh", _roff(usage), ".hy"]
    lines += [".SH DESCRIPTION", _roff(" ".join((parser.description or "").split()))]
    if commands:
        helps = _helps_of(parser)
        lines.append(".SH COMMANDS")
        for command in commands:
            lines += [".TP", rf"\fB{_roff(command)}\fR", _roff(helps[command])]
    shown = [action for action in _shown(parser) if action.nargs != argparse.PARSER]
    if shown:
        lines.append(".SH OPTIONS")
        for action in shown:
            lines += [".TP", _heading(action), _roff(_help(parser, action)) or r"\&"]
    if parser.epilog:
        lines += [".SH NOTES", ".nf", *(_roff(line) for line in parser.epilog.splitlines()), ".fi"]
    lines += [".SH SEE ALSO", _roff("jqcow(1), jqcow-img(1), jqcow-recover(1)")]
    return "\n".join(lines) + "\n"


def _shown(parser: argparse.ArgumentParser) -> list[Action]:
    return [action for action in parser._actions if action.help is not argparse.SUPPRESS]


def _help(parser: argparse.ArgumentParser, action: Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return " ".join(text.split())


def _heading(action: Action) -> str:
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else None
        value = str(action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return rf"\fI{_roff(value)}\fR"
    names = ", ".join(rf"\fB{_roff(name)}\fR" for name in action.option_strings)
    return rf"{names} \fI{_roff(value)}\fR" if value else names


def _roff(text: str) -> str:
    """Return a line of text as roff has it."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


# Completion


def bash_completion() -> str:
    """Return a script that completes commands, options and their values; elsewhere names of files."""
    whole = main.build_parser()
    commands = commands_of(whole)
    lines = [_BASH_START]
    words = [*commands, *_options(whole)]
    lines.append(f"        '') options={_quoted(words)} ;;")
    for name, parser in commands.items():
        lines.append(f"        {name}) options={_quoted(_options(parser))} ;;")
    lines.append("    esac")
    lines.append('    case "$command:$previous" in')
    for name, parser in commands.items():
        lines += _values(f"{name}:", parser)
    lines.append(_BASH_MIDDLE)
    alone = recover.build_parser()
    lines.append(f"    options={_quoted(_options(alone))}")
    lines.append('    case ":$previous" in')
    lines += _values(":", alone)
    lines.append(_BASH_END)
    return "\n".join(lines)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in _shown(parser) for name in action.option_strings]


def _values(prefix: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in _shown(parser):
        if action.option_strings and action.choices:
            pattern = "|".join(f"{prefix}{name}" for name in action.option_strings)
            yield f"        {pattern}) values={_quoted(map(str, action.choices))} ;;"


def _quoted(words: Iterable[str]) -> str:
    found = list(words)
    if any(re.search(r"['\s]", word) for word in found):
        raise ValueError(f"a word cannot be completed: {found}")
    return f"'{' '.join(found)}'"


_BASH_START = """\
# Completion of jqcow for bash; zsh takes it by bashcompinit. Made of the commands' own parser.

_jqcow_reply() {
    if [[ -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$current"))
    elif [[ $current == -* || ${1-} == words ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    else
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}

_jqcow_words() {
    current=${COMP_WORDS[COMP_CWORD]}
    previous=${COMP_WORDS[COMP_CWORD - 1]}
    # --option=value comes in three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
}

_jqcow() {
    local current previous command= index options= values=
    _jqcow_words
    for ((index = 1; index < COMP_CWORD; index++)); do
        [[ ${COMP_WORDS[index]} == -* ]] || { command=${COMP_WORDS[index]}; break; }
    done
    case $command in"""
_BASH_MIDDLE = """\
    esac
    if [[ -z $command ]]; then _jqcow_reply words; else _jqcow_reply; fi
}

_jqcow_recover() {
    local current previous options= values=
    _jqcow_words"""
_BASH_END = """\
    esac
    _jqcow_reply
}

complete -o filenames -F _jqcow jqcow jqcow-img
complete -o filenames -F _jqcow_recover jqcow-recover
"""


if __name__ == "__main__":
    write_below(Path(sys.argv[1]))
