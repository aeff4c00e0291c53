"""Who may import whom: the table of the design, held by a walk over the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fairasr_min"
STAGES = {"train", "finetune", "evaluate"}

MAY_IMPORT = {
    "__init__": set(),
    "layers": set(),
    "audio": {"layers"},
    "text": set(),
    "losses": set(),
    "conformer": {"layers"},
    "graphs": {"conformer"},
    "wer": set(),
    "stats": set(),
    "runtime": set(),
    "download": set(),
    "data": {"audio", "text"},
    "model": {"audio", "conformer", "layers", "losses", "text"},
    "nemo": {"audio", "conformer", "model", "text"},
    "checkpoint": {"nemo", "download", "model", "conformer", "audio", "text"},
    "report": {"text", "wer", "stats"},
    "report_html": set(),
    "embed": {"audio", "data", "decode", "model", "checkpoint", "runtime", "stats"},
    "decode": {"audio", "data", "layers", "model", "runtime"},
}
HERE = sorted(path.stem for path in PACKAGE.glob("*.py"))
STAGES_HERE = sorted(name for name in STAGES if (ROOT / f"{name}.py").exists())


def imported(path, package=None):
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                base = f"{package}.{base}".rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def tops(names):
    return {name.split(".")[0] for name in names}


def modules_of_ours(names):
    return {name.split(".")[1] for name in names if name.startswith("fairasr_min.")}


def imports_of(module):
    return imported(PACKAGE / f"{module}.py", "fairasr_min")


def test_the_walk_sees_every_kind_of_import(tmp_path):
    source = "import torch.nn as nn\nfrom . import a\nfrom .b import c\nfrom fairasr_min import d\n"
    source += "def f():\n    import fairasr_min.e\n    from fairasr_min.g import h, i\n"
    (tmp_path / "x.py").write_text(source)
    names = imported(tmp_path / "x.py", "fairasr_min")
    assert tops(names) == {"torch", "fairasr_min"}
    assert modules_of_ours(names) == {"a", "b", "d", "e", "g"}


def test_every_module_has_a_row_in_the_table():
    assert len(HERE) > 8
    assert set(HERE) <= set(MAY_IMPORT)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] not in "._"]


@pytest.mark.parametrize("module", HERE)
def test_modules_import_only_what_the_table_allows(module):
    names = imports_of(module)
    assert modules_of_ours(names) <= MAY_IMPORT[module]
    assert "fairasr_min" not in names  # the bare package says nothing about what is used


@pytest.mark.parametrize("module", HERE)
def test_modules_import_nothing_from_outside_the_package(module):
    outside = {"extras", "data", "benchmarks", "recipes", "tests", *STAGES}
    assert not tops(imports_of(module)) & outside


def reachable(module):
    """The module and everything of ours that it imports, however indirectly."""
    found, waiting = set(), [module]
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += modules_of_ours(imports_of(module)) & set(HERE)
    return found


@pytest.mark.parametrize("module", ["wer", "report", "text", "stats"])
def test_the_audit_needs_no_torch(module):
    if module not in HERE:
        pytest.skip(f"no {module}.py yet")
    for each in reachable(module):
        assert not tops(imports_of(each)) & {"torch", "torchaudio"}, each


def test_the_audit_loads_no_torch():
    """The same for what other libraries bring along."""
    code = "import sys, fairasr_min.report, fairasr_min.stats, fairasr_min.text, fairasr_min.wer\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_compiler_is_loaded_only_where_it_is_asked_for():
    """It takes a second and 100 MB."""
    code = "import sys, evaluate\nsys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", HERE)
def test_only_audio_knows_the_audio_libraries(module):
    used = tops(imports_of(module)) & {"torchaudio", "soundfile"}
    assert used == ({"torchaudio", "soundfile"} if module == "audio" else set())


@pytest.mark.parametrize("stage", STAGES_HERE)
def test_stages_import_the_package_and_never_one_another(stage):
    names = imported(ROOT / f"{stage}.py")
    assert modules_of_ours(names) & set(HERE)
    assert not tops(names) & {"extras", "data", "benchmarks", *STAGES}
    assert not tops(names) & {"torchaudio", "soundfile"}


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.py")), ids=lambda path: path.name)
def test_corpus_scripts_import_little(path):
    names = imported(path)
    assert modules_of_ours(names) <= {"audio", "data", "text"}
    assert not tops(names) & {"extras", *STAGES}


@pytest.mark.parametrize("path", sorted((ROOT / "extras").glob("*.py")), ids=lambda path: path.name)
def test_extras_import_the_package_and_never_one_another(path):
    others = {other.stem for other in (ROOT / "extras").glob("*.py")}
    assert not tops(imported(path, "extras")) & {"extras", *STAGES, *others}
