"""The house rules that a reader relies on: the import ladder, third-party doors, sizes, docstrings.

Rules are read off the syntax tree, so imports inside functions count, and nothing is imported.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scoreprior"
MAX_LINES = 399

# A module imports strictly lower rungs, and its own package.
LADDER = (
    {"_stack", "_typing", "_util", "gaussian", "operators"},
    {"denoise", "interferometry", "nn", "observation", "solver"},
    {"density", "feynman_kac", "flow", "ito", "sample", "train"},
    {"composition", "io", "likelihood", "prior"},
    {"_psis", "_run", "_slice", "guide", "problem"},
    {"mcmc", "smc", "vi"},
    {"check", "compare", "infer", "learn", "plot"},
    {"sbi"},
    {"cli"},
)
RUNG = {name: rung for rung, names in enumerate(LADDER) for name in names}
NEIGHBOURS = {
    ("composition", "prior"),
    ("density", "flow"),
    ("io", "prior"),
    ("_util", "_typing"),
} | {(name, helper) for name in ("gaussian", "operators") for helper in ("_typing", "_util")}

# Who may import a third-party package; the rest of the world is closed. The command line is a user
# of the library: its demo writes a NumPyro model and summarises the result, as a user does.
EVERYWHERE = {"equinox", "jax", "jaxtyping", "numpy"}
DOORS = {
    "arviz": {"compare", "infer", "sbi", "check", "plot", "cli"},
    "blackjax": {"_psis", "feynman_kac", "mcmc", "smc", "vi"},
    "dask": {"sbi"},
    "distributed": {"sbi"},
    "diffrax": {"solver"},
    "jax_finufft": {"operators"},
    "matplotlib": {"plot", "check"},
    "numpyro": {
        "composition",
        "likelihood",
        "prior",
        "problem",
        "vi",
        "infer",
        "sbi",
        "check",
        "cli",
    },
    "optax": {"mcmc", "train", "vi", "sbi"},
    "pandas": {"compare"},
    "safetensors": {"io", "train", "mcmc", "infer"},
    "sklearn": {"cli", "check"},
    "tqdm": {"_run", "train", "learn", "sbi", "cli"},
    "xarray": {"compare", "infer", "sbi", "check", "plot"},
    "zarr": {"sbi"},
}
LAZY = {"dask", "diffrax", "distributed", "jax_finufft", "matplotlib", "sklearn", "zarr"}
STANDARD = set(sys.stdlib_module_names)


def modules(package: Path):
    return sorted(package.rglob("*.py"))


def part_of(path: Path, package: Path) -> str:
    """The noun a file belongs to: `denoise` for `denoise/exact.py`, `` for the package itself."""
    first = path.relative_to(package).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(tree: ast.Module, path: Path, package: Path):
    """Every imported dotted name, with its line and whether it is imported at module level."""
    at_top = {id(node) for node in _at_module_level(tree)}
    here = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join([*base, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in at_top


def _at_module_level(node: ast.AST):
    """What runs on import: neither bodies of functions nor imports for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from child.orelse
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _at_module_level(child)


def import_faults(package: Path):
    """What breaks the ladder or goes round a door, one line of text each."""
    for path in modules(package):
        part = part_of(path, package)
        for name, line, at_top in imports(ast.parse(path.read_text()), path, package):
            where = f"{path.relative_to(package)}:{line}"
            head, _, rest = name.partition(".")
            if head == package.name:
                fault = _ladder_fault(part, rest.partition(".")[0], package)
            else:
                fault = _door_fault(part, head, at_top)
            if fault:
                yield f"{where}: {fault}"


def _ladder_fault(part: str, target: str, package: Path) -> str:
    if part in ("", target):
        return ""
    if part not in RUNG:
        return f"{part} stands on no rung of the ladder"
    if target not in RUNG:
        if target and any((package / name).exists() for name in (target, f"{target}.py")):
            return f"{part} imports {target}, which stands on no rung"
        # A name out of the package itself, which is the map of everything.
        return "" if part == "cli" else f"{part} imports from the top of the package"
    if RUNG[target] < RUNG[part] or (part, target) in NEIGHBOURS:
        return ""
    return f"{part} (rung {RUNG[part]}) imports {target} (rung {RUNG[target]})"


def _door_fault(part: str, head: str, at_top: bool) -> str:
    if head in EVERYWHERE or head in STANDARD:
        return ""
    if part not in DOORS.get(head, ()):
        return f"{part or 'the package'} imports {head}, which is not its door"
    return f"{head} must be imported lazily" if at_top and head in LAZY else ""


def signature_faults(path: Path):
    """Public functions and methods with a parameter or result that says no type."""

    def visit(body):
        for node in body:
            public = not getattr(node, "name", "_").startswith("_")
            if isinstance(node, ast.ClassDef) and public:
                yield from visit(node.body)
            elif isinstance(node, ast.FunctionDef) and public:
                args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in args if a.annotation is None]
                if set(bare) - {"self", "cls"} or node.returns is None:
                    yield f"{path.name}:{node.lineno}: {node.name} is not fully annotated"

    return visit(ast.parse(path.read_text()).body)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_module = pytest.mark.parametrize("path", modules(PACKAGE), ids=ids)
every_text = pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("scoreprior", "tests", "examples", "docs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".md", ".json", ".toml"} and "__pycache__" not in path.parts
    ]
    + sorted(ROOT.glob("*.md"))
    + [ROOT / "pyproject.toml", ROOT / "mkdocs.yml"],
    ids=ids,
)


def test_imports_climb_the_ladder_and_use_the_doors():
    assert list(import_faults(PACKAGE)) == []


@every_module
def test_a_module_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "a module docstring fixes notation and assumptions"


@every_module
def test_public_signatures_say_their_types(path):
    assert list(signature_faults(path)) == []


@every_text
def test_no_path_of_one_machine(path):
    hits = re.findall(r"(?<![\w.>/])/(?:home|root|tmp|work|Users|mnt|opt)/\w+", path.read_text())
    assert hits == []


PLANTED = {
    "denoise/base.py": "from scoreprior.flow import Flow",
    "density.py": "from . import flow\nfrom . import prior",
    "solver.py": "def f():\n    import diffrax",
    "io.py": "from scoreprior import prior\nimport torch",
    "mcmc/nuts.py": "def f():\n    import numpyro.infer",
    "mcmc/hmc.py": "from scoreprior.mcmc.nuts import x\nfrom ..smc import y",
    "sample.py": "from scoreprior.flow import Flow",
    "plot.py": "import matplotlib.pyplot as plt",
    "stray.py": "from scoreprior.gaussian import Moments",
    "problem.py": "from scoreprior import ScorePrior",
    "cli.py": "import scoreprior as sp\nfrom scoreprior import infer, load",
    "__init__.py": "from scoreprior.cli import main",
}
FOUND = [
    "denoise/base.py:1: denoise (rung 1) imports flow (rung 2)",
    "density.py:2: density (rung 2) imports prior (rung 3)",
    "io.py:2: io imports torch, which is not its door",
    "mcmc/hmc.py:2: mcmc (rung 5) imports smc (rung 5)",
    "mcmc/nuts.py:2: mcmc imports numpyro, which is not its door",
    "plot.py:1: matplotlib must be imported lazily",
    "problem.py:1: problem imports from the top of the package",
    "sample.py:1: sample (rung 2) imports flow (rung 2)",
    "stray.py:1: stray stands on no rung of the ladder",
]


def test_planted_faults_are_found_and_nothing_else(tmp_path):
    package = tmp_path / "scoreprior"
    for name, text in PLANTED.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert list(import_faults(package)) == FOUND


def test_a_planted_bare_signature_is_found(tmp_path):
    file = tmp_path / "bare.py"
    file.write_text(
        "def good(x: int) -> int: ...\n"
        "def bad(x) -> int: ...\n"
        "def _private(x): ...\n"
        "class Noun:\n"
        "    def verb(self, x: int): ...\n"
    )
    assert list(signature_faults(file)) == [
        "bare.py:2: bad is not fully annotated",
        "bare.py:5: verb is not fully annotated",
    ]
