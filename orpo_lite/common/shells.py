"""What each shell runs to complete `orpo-lite`, and where it reads that from."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orpo_lite.common.completion import answer
from orpo_lite.common.errors import RequestError

SCRIPTS = {
    "bash": """_orpo_lite() {
    local IFS=$'\\n'
    COMPREPLY=($(orpo-lite --complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} == 1 && ( ${COMPREPLY[0]} == *= || ${COMPREPLY[0]} == */ ) ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _orpo_lite orpo-lite
""",
    "zsh": """#compdef orpo-lite
_orpo_lite() {
    local -a found open
    found=("${(@f)$(orpo-lite --complete zsh "$LBUFFER" 2>/dev/null)}")
    found=(${found:#})
    if (( ! ${#found} )); then _files; return; fi
    open=(${(M)found:#*[=/]})
    compadd -Q -S '' -- $open
    compadd -Q -- ${found:#*[=/]}
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _orpo_lite "$@"; else compdef _orpo_lite orpo-lite; fi
""",
    "fish": """complete -c orpo-lite -a '(orpo-lite --complete fish (commandline -cp) 2>/dev/null)'
""",
    "powershell": """Register-ArgumentCompleter -Native -CommandName orpo-lite -ScriptBlock {
    param($word, $ast, $position)
    $line = $ast.ToString().PadRight($position).Substring(0, $position)
    orpo-lite --complete powershell $line 2>$null | ForEach-Object {
        $value, $about = $_ -split "`t", 2
        if (-not $about) { $about = $value }
        [System.Management.Automation.CompletionResult]::new($value, $value, 'ParameterValue', $about)
    }
}
""",
}


def script(shell: str | None) -> str:
    """The completion script of a shell; of the one that runs this where none is named.

    Raises:
        RequestError: not a shell that there is a script for.
    """
    return SCRIPTS[named(shell)]


def named(shell: str | None) -> str:
    name = (shell or os.path.basename(os.environ.get("SHELL", "")) or ("powershell" if os.name == "nt" else "")).lower()
    name = {"pwsh": "powershell"}.get(name.removesuffix(".exe"), name.removesuffix(".exe"))
    if name not in SCRIPTS:
        raise RequestError(
            f"found the shell {name or 'unknown'!r}, expected one of {', '.join(SCRIPTS)}: name it after the option"
        )
    return name


def install(shell: str | None) -> list[str]:
    """Put the script where the shell reads it at its start; what was done, in sentences.

    Raises:
        RequestError: not a shell that there is a script for, or PowerShell cannot be asked for its profile.
    """
    name, home = named(shell), Path.home()
    if name == "fish":
        place, start, line = (
            Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish/completions/orpo-lite.fish",
            None,
            "",
        )
    elif name == "powershell":
        place = profile()
        before = place.read_text("utf-8") if place.is_file() else ""
        text = before if SCRIPTS[name] in before else f"{before.rstrip()}\n\n{SCRIPTS[name]}".lstrip()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, "utf-8")
        return [f"in {place}", "open a new PowerShell to use it"]
    else:
        place = home / ".local/share/orpo-lite" / f"completion.{name}"
        start = home / ".bashrc" if name == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        load = "autoload -Uz compinit && compinit; " if name == "zsh" else ""
        line = (
            f"[ -f {shlex.quote(str(place))} ] && {{ {load}. {shlex.quote(str(place))}; }}  # completion of orpo-lite"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(SCRIPTS[name], "utf-8")
    said = [f"written: {place}"]
    if start is not None:
        text = start.read_text("utf-8") if start.is_file() else ""
        if line not in text:
            start.write_text(f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n", "utf-8")
        said.append(f"read by {start}")
    return [*said, f"open a new {name} to use it"]


def profile() -> Path:
    """PowerShell's own word for the file that it reads at its start."""
    program = shutil.which("pwsh") or shutil.which("powershell")
    if program is None:
        raise RequestError(
            "there is no pwsh or powershell to ask for its profile: put the output of --show-completion powershell there"
        )
    done = subprocess.run(
        [program, "-NoProfile", "-Command", "$PROFILE"], capture_output=True, text=True, check=True, timeout=60
    )
    return Path(done.stdout.strip())


def main(option: str, words: list[str], commands: Mapping[str, str]) -> None:
    """`--complete SHELL LINE`, `--show-completion [SHELL]`, `--install-completion [SHELL]`."""
    if option == "--complete":
        found = answer(words[0], " ".join(words[1:]), commands)
        print(found, end="\n" if found else "")
    elif option == "--show-completion":
        print(script(words[0] if words else None), end="")
    else:
        print("\n".join(install(words[0] if words else None)))
