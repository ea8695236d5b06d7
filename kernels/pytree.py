"""Dataclasses as trees of arrays."""

import dataclasses
from typing import TypeVar

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Register a dataclass, all of whose fields are subtrees, with jax.

    Unlike jax.tree_util.register_dataclass this does not construct: jax also makes trees of shapes,
    of shardings and of stacked arrays, which a type checker of the fields would refuse.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(tree: T):
        return tuple(getattr(tree, name) for name in names), None

    def flatten_with_keys(tree: T):
        return tuple((GetAttrKey(name), getattr(tree, name)) for name in names), None

    def unflatten(_, children) -> T:
        tree = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(tree, name, child)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
