"""The rules of the house that no linter knows: layers, packaging, names, sizes.

Each rule is a function from the root of a checkout to the list of its faults. It is tried on this
checkout, where it must find nothing, and on a small tree that breaks it, where it must find that.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("seeds", "models", "refine_af", "configs", "launch")  # bottom up; also the folders
CONFIG_FILES = ("refine_af/config.py", "models/config.py")
NOT_PROGRAMS = {"flags"}  # modules of launch/ that are shared by the programs
MAX_LINES = 500


# Reading a checkout


def python_files(root: Path, folders: tuple[str, ...] = LAYERS) -> list[Path]:
    """Paths relative to `root`."""
    return sorted(p.relative_to(root) for folder in folders for p in (root / folder).rglob("*.py"))


def parse(root: Path, path: Path) -> ast.Module:
    return ast.parse((root / path).read_text(encoding="utf-8"), filename=str(path))


def pyproject(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def package_of(folder: Path) -> str:
    """`models/presets` is imported as `refine_af.models.presets`."""
    parts = folder.parts if folder.parts[0] == "refine_af" else ("refine_af", *folder.parts)
    return ".".join(parts)


def imports(root: Path, path: Path) -> Iterator[str]:
    """Absolute dotted names of what a file imports, wherever in the file it does so."""
    for node in ast.walk(parse(root, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                package = package_of(path.parent).split(".")
                origin = package[: len(package) + 1 - node.level] + origin
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def layer_of(module: str) -> str | None:
    """Layer of a dotted module name, None outside this project."""
    top, *rest = module.split(".")
    if top != "refine_af":
        return None
    return rest[0] if rest and rest[0] in LAYERS else "refine_af"


# The rules


def upward_imports(root: Path) -> list[str]:
    return [
        f"{path} imports {name}"
        for path in python_files(root)
        for name in imports(root, path)
        if (layer := layer_of(name)) and LAYERS.index(layer) > LAYERS.index(path.parts[0])
    ]


def bare_imports(root: Path) -> list[str]:
    """Names that exist at the root of a checkout only, and there as a second copy."""
    return [
        f"{path} imports {name}"
        for path in python_files(root, (*LAYERS, "tests"))
        for name in imports(root, path)
        if name.split(".")[0] in set(LAYERS) - {"refine_af"}
    ]


def layers_with_the_wrong_company(root: Path) -> list[str]:
    """Seeds use the standard library alone; flags are read by the programs alone."""
    faults = []
    for path in python_files(root):
        for name in imports(root, path):
            foreign = layer_of(name) is None and name.split(".")[0] not in sys.stdlib_module_names
            flags = name.startswith(("absl.flags", "absl.app", "argparse"))
            if (path.parts[0] == "seeds" and foreign) or (path.parts[0] != "launch" and flags):
                faults.append(f"{path} imports {name}")
    return faults


def packages_unlike_folders(root: Path) -> list[str]:
    """A folder that pyproject.toml does not list drops out of the wheel without a word."""
    setuptools = pyproject(root)["tool"]["setuptools"]
    listed = set(setuptools["packages"])
    folders = sorted({path.parent for path in python_files(root)})
    found = {package_of(folder) for folder in folders}
    faults = [f"{package} is not listed in packages" for package in sorted(found - listed)]
    faults += [f"{package} is listed and has no files" for package in sorted(listed - found)]
    faults += [
        f"{folder} has no __init__.py"
        for folder in folders
        if not (root / folder / "__init__.py").exists()
    ]
    if setuptools["package-dir"] != {package_of(Path(layer)): layer for layer in LAYERS}:
        faults.append("package-dir does not map each layer to its folder")
    return faults


def data_outside_the_wheel(root: Path) -> list[str]:
    """Data files that no pattern of package-data takes along, and patterns that take none."""
    setuptools = pyproject(root)["tool"]["setuptools"]
    taken: dict[str, set[Path]] = {}
    for package, patterns in setuptools["package-data"].items():
        folder = root / setuptools["package-dir"][package]
        taken |= {f"{folder.name}/{pattern}": set(folder.glob(pattern)) for pattern in patterns}
    data = {
        path
        for layer in LAYERS
        for path in (root / layer).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    left = sorted(path.relative_to(root) for path in data - set().union(*taken.values()))
    left = [path for path in left if not any(part.startswith(".") for part in path.parts)]
    return [f"{path} matches no pattern of package-data" for path in left] + [
        f"{pattern} matches no file" for pattern, files in taken.items() if not files
    ]


def config_fields(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(class, field) of every dataclass of a module."""
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef) and any(
            "dataclass" in ast.unparse(decorator) for decorator in owner.decorator_list
        ):
            for line in owner.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(
                    line.annotation
                ):
                    yield owner.name, ast.unparse(line.target)


def unread_config_fields(root: Path) -> list[str]:
    """An option that nothing reads is a promise not kept. Matches by name, so it can miss some."""
    read = {
        node.attr
        for path in python_files(root)
        if str(path) not in CONFIG_FILES and path.parts[0] != "configs"
        for node in ast.walk(parse(root, path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    return [
        f"{path}: {owner}.{field} is never read"
        for path in CONFIG_FILES
        for owner, field in config_fields(parse(root, Path(path)))
        if field not in read
    ]


def long_files(root: Path) -> list[str]:
    lengths = {
        path: len((root / path).read_text(encoding="utf-8").splitlines())
        for path in python_files(root, (*LAYERS, "tests"))
    }
    return [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]


def names_that_say_nothing(root: Path) -> list[str]:
    empty = {"util", "utils", "helper", "helpers", "core"}
    return [
        f"{path} is called {word}"
        for path in python_files(root, (*LAYERS, "tests"))
        for part in path.with_suffix("").parts
        for word in part.split("_")
        if word in empty
    ]


def scripts_unlike_programs(root: Path) -> list[str]:
    """Console scripts and programs of launch/ correspond one to one."""
    scripts = pyproject(root)["project"]["scripts"]
    programs = {path.stem for path in (root / "launch").glob("[!_]*.py")} - NOT_PROGRAMS
    expected = {
        f"refine-af-{name.replace('_', '-')}": f"refine_af.launch._cli:{name}" for name in programs
    }
    return [
        f"console script {name}: {scripts.get(name)}, expected {expected.get(name)}"
        for name in sorted(scripts.keys() | expected.keys())
        if scripts.get(name) != expected.get(name)
    ]


def version_unlike_changelog(root: Path) -> list[str]:
    version = pyproject(root)["project"]["version"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    newest = headings[0] if headings else None
    return [] if version == newest else [f"version {version}, newest in CHANGELOG.md {newest}"]


# The rules on this checkout


def files_missing_from_the_readme(root: Path) -> list[str]:
    """The README's tree has a line, or a place in one, for every module."""
    tree = (root / "README.md").read_text(encoding="utf-8")
    modules = [p for p in python_files(root) if p.name != "__init__.py"]
    return [f"README.md does not name {path}" for path in modules if path.name not in tree]


RULES: list[Callable[[Path], list[str]]] = [
    upward_imports,
    bare_imports,
    layers_with_the_wrong_company,
    packages_unlike_folders,
    data_outside_the_wheel,
    unread_config_fields,
    long_files,
    names_that_say_nothing,
    scripts_unlike_programs,
    version_unlike_changelog,
    files_missing_from_the_readme,
]


@pytest.mark.parametrize("rule", RULES)
def test_this_checkout_keeps(rule):
    faults = rule(ROOT)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", [*LAYERS, "tests"])
def test_every_folder_is_looked_at(folder):
    assert Path(folder) in {path.parent for path in python_files(ROOT, (folder,))}


# The rules on trees that break them


PYPROJECT = """
[project]
version = "0.2.0"
[project.scripts]
refine-af-train-ppo = "refine_af.launch._cli:train_ppo"
[tool.setuptools]
packages = [
    "refine_af", "refine_af.models", "refine_af.launch", "refine_af.configs", "refine_af.seeds"
]
[tool.setuptools.package-dir]
"refine_af" = "refine_af"
"refine_af.models" = "models"
"refine_af.launch" = "launch"
"refine_af.configs" = "configs"
"refine_af.seeds" = "seeds"
[tool.setuptools.package-data]
"refine_af" = ["*.j2"]
"refine_af.seeds" = ["evaluation/*.json"]
"""
CONFIG = """
@dataclass(frozen=True)
class PPO:
    num_epochs: int = 4
    clip_eps: float = 0.2

class Sampler:
    temperature: float = 1.0
"""
SOUND = {
    "pyproject.toml": PYPROJECT,
    "README.md": "config.py llama2.py ppo.py demo.py _cli.py flags.py train_ppo.py",
    "CHANGELOG.md": "# Changelog\n## [Unreleased]\n## [0.2.0]\n## [0.1.0]\n",
    **{f"{folder}/__init__.py": "" for folder in LAYERS},
    "seeds/evaluation/one.json": "{}",
    "models/config.py": "",
    "models/llama2.py": "import jax\nfrom refine_af.models import config\nimport refine_af.seeds",
    "refine_af/config.py": CONFIG,
    "refine_af/ppo.py": "ppo.num_epochs + ppo.clip_eps\nfrom refine_af.models import llama2",
    "refine_af/report.html.j2": "",
    "configs/demo.py": "from refine_af import config",
    "launch/_cli.py": "",
    "launch/flags.py": "from absl import flags",
    "launch/train_ppo.py": "from absl import app\nfrom refine_af.configs import demo",
}

BROKEN = [
    (upward_imports, "models/llama2.py", "import refine_af", "refine_af"),
    (upward_imports, "models/llama2.py", "from refine_af import config", "refine_af.config"),
    (
        upward_imports,
        "models/llama2.py",
        "from refine_af.ppo import update",
        "refine_af.ppo.update",
    ),
    (upward_imports, "refine_af/ppo.py", "from .launch import flags", "refine_af.launch.flags"),
    (upward_imports, "models/llama2.py", "from .. import ppo", "refine_af.ppo"),
    (
        upward_imports,
        "seeds/__init__.py",
        "def f():\n  from ..models import x",
        "refine_af.models.x",
    ),
    (bare_imports, "launch/train_ppo.py", "import models.llama2", "models.llama2"),
    (bare_imports, "tests/test_ppo.py", "from seeds import load", "seeds.load"),
    (layers_with_the_wrong_company, "seeds/__init__.py", "import numpy", "numpy"),
    (layers_with_the_wrong_company, "refine_af/ppo.py", "from absl import flags", "absl.flags"),
]


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_tree_keeps(rule, tmp_path):
    assert rule(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "path", "text", "name"), BROKEN)
def test_import_is_caught(rule, path, text, name, tmp_path):
    assert rule(build(tmp_path, SOUND | {path: text})) == [f"{path} imports {name}"]


@pytest.mark.parametrize(
    ("rule", "files", "fault"),
    [
        (
            packages_unlike_folders,
            {"models/presets/__init__.py": ""},
            "refine_af.models.presets is not listed in packages",
        ),
        (
            packages_unlike_folders,
            {"pyproject.toml": PYPROJECT.replace("packages = [", 'packages = ["gone",')},
            "gone is listed and has no files",
        ),
        (
            packages_unlike_folders,
            {
                "pyproject.toml": PYPROJECT.replace("[\n", '["refine_af.models.presets",\n', 1),
                "models/presets/seven.py": "",
            },
            "models/presets has no __init__.py",
        ),
        (
            packages_unlike_folders,
            {"pyproject.toml": PYPROJECT.replace('"refine_af.models" = "models"\n', "")},
            "package-dir does not map each layer to its folder",
        ),
        (
            data_outside_the_wheel,
            {"seeds/evaluation/deep/two.json": "{}"},
            "seeds/evaluation/deep/two.json matches no pattern of package-data",
        ),
        (
            data_outside_the_wheel,
            {"pyproject.toml": PYPROJECT.replace('["*.j2"]', '["*.j2", "*.css"]')},
            "refine_af/*.css matches no file",
        ),
        (
            unread_config_fields,
            {"refine_af/ppo.py": "ppo.num_epochs = ppo.clip_eps"},
            "refine_af/config.py: PPO.num_epochs is never read",
        ),
        (long_files, {"models/t5.py": "\n" * 501}, "models/t5.py has 501 lines"),
        (
            names_that_say_nothing,
            {"refine_af/text_utils.py": ""},
            "refine_af/text_utils.py is called utils",
        ),
        (
            scripts_unlike_programs,
            {"launch/score.py": ""},
            "console script refine-af-score: None, expected refine_af.launch._cli:score",
        ),
        (
            scripts_unlike_programs,
            {"pyproject.toml": PYPROJECT.replace("_cli:train_ppo", "_cli:train")},
            "console script refine-af-train-ppo: refine_af.launch._cli:train, "
            "expected refine_af.launch._cli:train_ppo",
        ),
        (
            files_missing_from_the_readme,
            {"models/t5.py": ""},
            "README.md does not name models/t5.py",
        ),
        (
            version_unlike_changelog,
            {"CHANGELOG.md": "## [Unreleased]\n## [0.1.0]\n"},
            "version 0.2.0, newest in CHANGELOG.md 0.1.0",
        ),
    ],
)
def test_fault_is_caught(rule, files, fault, tmp_path):
    assert rule(build(tmp_path, SOUND | files)) == [fault]
