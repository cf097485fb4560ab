"""Where the text of prism-nano-mix comes from: four domains, each from several projects."""

from __future__ import annotations

import json
import re
import site
import sysconfig
from pathlib import Path

from corpus import Source

from moe_prism.data.bundled import is_program

# in megabytes of text; packages that are not named have PYTHON_OTHER
PYTHON = {"torch": 1.5, "transformers": 1.5, "sympy": 1.2, "scipy": 1.0, "numpy": 1.0, "networkx": 1.0, "numba": 1.0, "pip": 0.6}
PYTHON_OTHER = 0.35
PYTHON_LICENCES = {
    "torch": "BSD-3-Clause", "transformers": "Apache-2.0", "sympy": "BSD-3-Clause", "scipy": "BSD-3-Clause", "numpy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause", "numba": "BSD-2-Clause", "pip": "MIT", "mpmath": "BSD-3-Clause", "jinja2": "BSD-3-Clause",
    "pygments": "BSD-2-Clause", "fastapi": "MIT", "rich": "MIT", "werkzeug": "BSD-3-Clause", "fsspec": "BSD-3-Clause",
    "huggingface_hub": "Apache-2.0", "mypy": "MIT", "openai": "Apache-2.0", "requests": "Apache-2.0", "urllib3": "MIT",
    "uvicorn": "BSD-3-Clause", "httpx2": "BSD-3-Clause", "anyio": "MIT", "pydantic": "MIT", "filelock": "MIT", "narwhals": "MIT",
}  # fmt: skip
PERMISSIVE = {"MIT", "ISC", "BSD", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "0BSD", "CC0-1.0", "Unlicense"}
# names that every project has: only with the project do they tell one file from another
GENERIC = {
    "index", "package", "readme", "license", "licence", "copyright", "changelog", "changes", "history", "metadata", "main", "utils", "util",
    "types", "core", "config", "install", "overview", "intro", "introduction", "contents", "setup", "news", "todo", "authors",
    "contributing", "common", "base", "constants", "helpers", "errors", "bower", "composer", "component", "tsconfig", "schema",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]{2,}")


def is_prose(text: str) -> bool:
    """Sentences: letters for the most part, and words as frequent as in running English."""
    head = text[:20_000]
    letters = sum(c.isalpha() or c.isspace() for c in head)
    words = _WORD.findall(head)
    common = sum(w in {"the", "of", "to", "and", "is", "in", "that", "for", "it", "this", "with", "be"} for w in words)
    return letters > 0.8 * len(head) and len(words) > 60 and common > 0.12 * len(words)


def is_header(text: str) -> bool:
    return is_program(text) and ("#include" in text or "#define" in text or "class " in text or "namespace" in text)


def is_web(text: str) -> bool:
    """Written by people: no minified line, no long row of data."""
    lines = text.splitlines()
    head = text[:20_000]
    letters = sum(c.isalpha() or c.isspace() for c in head)
    return len(lines) > 5 and len(text) < 90 * len(lines) and max(map(len, lines)) < 1000 and letters > 0.6 * len(head)


def name_of(source: Source, relative: Path) -> str:
    """project/path, with the project in the base name where that alone is what many projects have."""
    name = relative.name.removesuffix(".gz")
    stem = name.split(".")[0].lower()
    if stem in GENERIC:
        name = "-".join([source.project.replace("/", "-"), *relative.parts[-2:-1], name])
    return "/".join([source.project, *relative.parts[:-1], name])


def python_sources() -> list[Source]:
    base = Path(sysconfig.get_path("purelib"))
    found = [Source("python", "stdlib", "PSF-2.0", Path(sysconfig.get_path("stdlib")), (".py",), is_program, 6.0, 300_000)]
    packages = sorted(p for p in base.iterdir() if p.is_dir() and (p / "__init__.py").is_file() and p.name != "moe_prism")
    other = [
        Source(
            "python", p.name, PYTHON_LICENCES.get(p.name, "its own"), p, (".py",), is_program, PYTHON.get(p.name, PYTHON_OTHER)
        )
        for p in packages
    ]
    return [*found, *other]


def prose_sources(fetched: Path) -> list[Source]:
    apt = fetched / "apt/root"
    text = (".rst", ".txt", ".md")
    rows = [
        ("python3.11-doc", "PSF-2.0", 3.5, "_sources"),
        ("llvm-14-doc", "Apache-2.0", 2.0, "_sources"),
        ("linux-doc-6.1", "GPL-2.0", 2.5, "Documentation"),
        ("python-sqlalchemy-doc", "MIT", 1.5, "rst"),
        ("nodejs-doc", "MIT", 1.5, "api"),
        ("git-doc", "GPL-2.0", 1.0, ""),
        ("debian-policy", "GPL-2.0", 0.6, ""),
        ("developers-reference", "GPL-2.0", 0.5, "_sources"),
        ("debian-reference-en", "GPL-2.0", 0.5, ""),
        ("bash-doc", "GPL-3.0", 0.3, ""),
    ]
    found = [Source("prose", p, lic, apt / p, text, is_prose, mb, 300_000, only=only) for p, lic, mb, only in rows]
    names = ("README", "NEWS", "FAQ", "TODO", "copyright", ".txt", ".md")
    found.append(Source("prose", "debian", "its own", Path("/usr/share/doc"), names, is_prose, 1.5))
    metadata = ("METADATA", "LICENSE", "README", ".md", ".rst")
    bases = sorted({Path(p) for p in site.getsitepackages()})
    found += [Source("prose", "pypi", "its own", base, metadata, is_prose, 2.0) for base in bases]
    readme = ("README", "readme")
    found += [
        Source("prose", f"npm/{p.name}", lic, p, readme, is_prose, 0.02, 40_000, frozenset({"node_modules"}))
        for p, lic in npm_packages(fetched)
    ]
    return found


def header_sources(fetched: Path) -> list[Source]:
    base, apt = Path(sysconfig.get_path("purelib")), fetched / "apt/root"
    header = (".h", ".hpp", ".ipp", ".hxx", ".cuh")
    rows = [
        ("torch", "BSD-3-Clause", base / "torch/include", 4.0),
        ("numpy", "BSD-3-Clause", base / "numpy/_core/include", 0.6),
        ("llvm", "Apache-2.0", Path("/usr/include/llvm-14"), 2.0),
        ("node", "MIT", Path("/usr/include/node"), 1.2),
        ("icu", "ICU", Path("/usr/include/unicode"), 0.7),
        ("boost", "BSL-1.0", apt / "libboost1.74-dev/usr/include", 3.0),
        ("eigen", "MPL-2.0", apt / "libeigen3-dev/usr/include", 1.0),
        ("abseil", "Apache-2.0", apt / "libabsl-dev/usr/include", 1.0),
        ("fmt", "MIT", apt / "libfmt-dev/usr/include", 0.3),
        ("range-v3", "BSL-1.0", apt / "librange-v3-dev/usr/include", 0.8),
        ("json", "MIT", apt / "nlohmann-json3-dev/usr/include", 0.4),
    ]
    generated = frozenset({"ops", "openssl", "preprocessed"})
    found = [Source("headers", p, lic, root, header, is_header, mb, skip=generated) for p, lic, root, mb in rows]
    return [*found, Source("headers", "libstdc++", "GPL-3.0", Path("/usr/include/c++/12"), ("", *header), is_header, 1.5)]


def npm_packages(fetched: Path) -> list[tuple[Path, str]]:
    """Packages under a permissive licence, by what their package.json says."""
    modules = fetched / "npm/node_modules"
    found = []
    for path in sorted([*modules.glob("*/package.json"), *modules.glob("@*/*/package.json")]):
        try:
            licence = json.loads(path.read_text()).get("license")
        except ValueError:
            continue
        if isinstance(licence, str) and licence in PERMISSIVE:
            found.append((path.parent, str(licence)))
    return found


def web_sources(fetched: Path) -> list[Source]:
    apt, modules = fetched / "apt/root", fetched / "npm/node_modules"
    skip = frozenset({"node_modules", "dist", "build", "umd", "min", "locales", "i18n", "languages"})
    found = []
    for path, licence in npm_packages(fetched):
        project = f"npm/{path.relative_to(modules).as_posix()}"
        found.append(Source("web", project, licence, path, (".js", ".mjs", ".cjs"), is_web, 0.06, 100_000, skip))
        found.append(Source("web", project, licence, path, (".json",), is_web, 0.015, 30_000, skip))
        found.append(Source("web", project, licence, path, (".html",), is_web, 0.05, 60_000, skip))
    pages = [
        ("sqlite3-doc", "public domain", 1.2), ("postgresql-doc-15", "PostgreSQL", 1.0),
        ("apache2-doc", "Apache-2.0", 1.2), ("python-django-doc", "BSD-3-Clause", 1.0),
    ]  # fmt: skip
    return [*found, *(Source("web", p, lic, apt / p, (".html",), is_web, mb, 100_000) for p, lic, mb in pages)]


def sources(fetched: Path) -> list[Source]:
    return [*python_sources(), *prose_sources(fetched), *header_sources(fetched), *web_sources(fetched)]
