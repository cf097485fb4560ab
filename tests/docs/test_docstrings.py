"""Every public function, class and method says what it is for: itself, or the contract that it fulfils.

Ruff's D rules hold the form; they do not know that a method's contract may be documented where it is declared, so that part is here.
"""

import importlib
import inspect
import pkgutil

import pytest

import moe_prism

SHORT = 4  # lines of a property or method whose name and types say all there is to say
MODULES = [
    m.name for m in pkgutil.walk_packages(moe_prism.__path__, "moe_prism.") if ".vllm" not in m.name and "triton" not in m.name
]


def is_documented(owner, name):
    return any(inspect.getdoc(vars(base)[name]) for base in owner.__mro__[1:] if name in vars(base))


def undocumented(module):
    for name, thing in vars(module).items():
        if not name.isidentifier() or name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not thing.__doc__:
            yield name
        if inspect.isclass(thing):
            if not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}("):  # dataclass writes a signature
                yield name
            for member, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if member.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
                    continue
                lines = len(inspect.getsource(function).splitlines())
                if not function.__doc__ and lines > SHORT and not is_documented(thing, member):
                    yield f"{name}.{member}"


@pytest.mark.parametrize("package", sorted({name.split(".")[1] for name in MODULES}))
def test_what_is_public_is_documented(package):
    modules = [importlib.import_module(name) for name in MODULES if name.split(".")[1] == package]
    assert modules and not [module.__name__ for module in modules if not module.__doc__]
    assert not [f"{module.__name__}.{name}" for module in modules for name in undocumented(module)]
