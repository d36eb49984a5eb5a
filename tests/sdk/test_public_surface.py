"""The names that users' scripts rely on, and that verbs are functions and modules in any order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgewright
from edgewright.cli import app

NAMES = [
    "__version__",
    "bench",
    "check",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "generate",
    "ls",
    "open_session",
    "plan",
    "report",
    "run",
    "speculate",
    "verify",
]
VERBS = [
    "check",
    "plan",
    "run",
    "evaluate",
    "export",
    "verify",
    "bench",
    "speculate",
    "generate",
    "report",
    "ls",
    "doctor",
    "explain",
]
OPTIONS = {
    "check": {"--schema", "--show-batch", "--json", "--help"},
    "plan": {
        "--device",
        "--no-probe",
        "--speculative",
        "--runtime",
        "--quant",
        "--draft",
        "--acceptance",
        "--gamma",
        "--threads",
        "--json",
        "--help",
    },
    "run": {"--fresh", "--json", "--help"},
    "evaluate": {"--data", "--text-key", "--max-tokens", "--threads", "--json", "--help"},
    "export": {
        "--to", "--quant", "--size", "--out", "--embedding-quant", "--max-kl", "--budget-mb", "--calibrate", "--method",
        "--no-verify", "--draft", "--draft-quant", "--draft-embedding-quant", "--gamma", "--prompts", "--threads",
        "--json", "--help",
    },
    "verify": {"--against", "--size", "--max-kl", "--data", "--draft", "--threads", "--json", "--help"},
    "bench": {"--prompt", "--generate", "--repeats", "--loop", "--pack", "--threads", "--json", "--help"},
    "speculate": {
        "--target", "--draft", "--prompts", "--gamma", "--ngram", "--temperature", "--top-k", "--top-p",
        "--greedy-draft", "--max-new-tokens", "--max-prompt-tokens", "--limit", "--seed", "--threads", "--json",
        "--help",
    },
    "generate": {"--prompt", "--max-new-tokens", "--temperature", "--seed", "--threads", "--json", "--help"},
    "report": {"--add", "--json", "--help"},
    "ls": {"--json", "--help"},
    "doctor": {"--json", "--help"},
    "explain": {"--json", "--help"},
}  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_frozen() -> None:
    assert edgewright.__all__ == NAMES
    assert sorted(edgewright.__all__) == sorted(dir(edgewright))
    assert all(callable(getattr(edgewright, name)) for name in NAMES if name != "__version__")
    assert edgewright.__version__.count(".") == 2


def test_the_verbs_and_their_options_are_frozen() -> None:
    import typer

    command = typer.main.get_command(app)
    assert list(command.commands) == VERBS
    for name, verb in command.commands.items():
        context = verb.make_context(name, [], resilient_parsing=True)
        found = {option for parameter in verb.get_params(context) for option in parameter.opts if option[:2] == "--"}
        assert found == OPTIONS[name], name


def test_every_verb_is_a_function_of_the_package() -> None:
    assert set(VERBS) <= set(NAMES)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgewright.nothing  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import edgewright",
        "from edgewright.export.lattice import LatticeTensor; import edgewright",
        "import edgewright.run; import edgewright",
        "from edgewright.run import run; import edgewright; assert run is edgewright.run.run",
        "import edgewright; edgewright.export; from edgewright.export.lattice import LatticeTensor",
        "from edgewright import run, export, check; import edgewright; assert callable(run) and callable(export)",
        "from edgewright.export import export; import edgewright; assert callable(export)",
        "import edgewright.explain, edgewright.export.lattice, edgewright.bench, edgewright.report",
    ],
)
def test_verbs_can_be_called_in_any_order_of_imports(imports: str) -> None:
    """A call with no arguments must reach the function: it complains about its own parameters."""
    verbs = [verb for verb in VERBS if verb not in ("doctor", "bench")]  # these can be called without arguments
    python(
        f"{imports}\n"
        "import inspect, edgewright\n"
        f"for verb in {verbs!r}:\n"
        "    function = getattr(edgewright, verb)\n"
        "    assert inspect.signature(function).parameters, verb\n"
        "    try:\n"
        "        function()\n"
        "    except TypeError as error:\n"
        "        assert f'{verb}() missing' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(verb)\n"
        "assert edgewright.explain('EW-110').code == 'EW-110'\n"
        "from edgewright.export.lattice import LatticeTensor\n"
    )


def test_importing_the_package_is_light() -> None:
    loaded = python("import edgewright, sys; print(*sorted(sys.modules))").split()
    assert not {"torch", "numpy", "pydantic", "ruamel", "typer", "rich", "transformers"} & set(loaded)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgewright.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'ruamel.yaml', 'rich', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    text = python(code)
    assert all(f"  {verb} " in text for verb in VERBS)
