"""The seam: a processor of diffusers as it is, but for its calls of the attention function.

A processor's class is given a subclass whose `__call__` is made of the same source, in which

    dispatch_attention_fn(query, key, value, ...)       becomes
    self.ras_site.attend(dispatch_attention_fn, 1, query, key, value, ...)

and a rotation by `apply_ro…(tokens, table)` likewise a call of `self.ras_site.rotate`. Projections,
norms, the order of the joint sequence, masks, scales and the user's choice of a backend stay the
processor's own, whatever its version. Nothing of diffusers is patched, and compilers see plain
methods of one class for all layers of a kind.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, cast

from .site import RASAttnProcessor, Site

TOKENS_AT = {
    "dispatch_attention_fn": 1,
    "F.scaled_dot_product_attention": 2,
    "torch.nn.functional.scaled_dot_product_attention": 2,
}
"""Functions that attend, and the dimension of the tokens in what they take."""
ROTATIONS = "apply_ro"  # how the names of all of diffusers' begin
SLOTS = ("ras_original", "ras_site")


def redirect(original: Any, site: Site) -> Any:
    """A processor that computes what `original` does and attends by `site`.

    It shares the state of `original`, so that what is set on the one is set on the other.

    Raises:
        ValueError: Its class cannot be redirected; see `can_redirect`.
    """
    kind = _redirected(cast(Any, type(original)))
    if kind is None:
        raise ValueError(f"{type(original).__name__} has no attention that could be redirected")
    ours = object.__new__(kind)
    object.__setattr__(ours, "__dict__", vars(original))
    object.__setattr__(ours, "ras_original", original)
    object.__setattr__(ours, "ras_site", site)
    return ours


def can_redirect(original: Any) -> bool:
    """Whether there is a source, with a call of a known attention function and no closure."""
    return _redirected(cast(Any, type(original))) is not None


@functools.cache
def _redirected(kind: Any) -> Any:
    """The subclass of a processor's class; None where there is none to be had."""
    call = inspect.unwrap(kind.__call__)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, TypeError, SyntaxError):
        return None
    redirector = _Redirector()
    tree = redirector.visit(tree)
    if not redirector.attends or call.__closure__:
        return None
    # Tracebacks, and guards of compilers, go by the lines of the original.
    ast.increment_lineno(tree, call.__code__.co_firstlineno - 1)
    flags = call.__code__.co_flags & __future__.annotations.compiler_flag
    module = compile(tree, call.__code__.co_filename, "exec", flags, dont_inherit=True)
    code = next(each for each in _codes(module) if each.co_name == call.__name__)
    ours = types.FunctionType(code, call.__globals__, call.__name__, call.__defaults__)
    ours.__kwdefaults__ = call.__kwdefaults__
    members = {
        "__slots__": SLOTS,  # beside the state, which is shared
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__call__": ours,
        # Loaders of IP-adapters make new ones of the class that they find: plain ones.
        "__new__": lambda cls, *args, **kwargs: kind(*args, **kwargs),
    }
    return type(kind.__name__, (_Redirected, kind), members)


class _Redirected(RASAttnProcessor):
    """What all of them are."""

    __slots__ = ()


class _Redirector(ast.NodeTransformer):
    def __init__(self) -> None:
        self.attends = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name in TOKENS_AT:
            self.attends = True
            node.args[:0] = [node.func, ast.copy_location(ast.Constant(TOKENS_AT[name]), node)]
            node.func = _of_site("attend", node)
        elif name.startswith(ROTATIONS):
            node.args.insert(0, node.func)
            node.func = _of_site("rotate", node)
        return node


def _of_site(method: str, node: ast.expr) -> ast.expr:
    expression = ast.parse(f"self.ras_site.{method}", mode="eval").body
    for part in ast.walk(expression):
        ast.copy_location(part, node)
    return expression


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    return (each for each in code.co_consts if isinstance(each, types.CodeType))
