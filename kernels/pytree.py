"""Dataclasses as trees of arrays."""

import dataclasses
from typing import TypeVar

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Register a dataclass with jax. Its fields are subtrees; those marked static are constants.

    Mark them as for jax.tree_util.register_dataclass: dataclasses.field(metadata={"static": True}).
    That function calls the constructor for every tree that jax makes, trees of shapes, of shardings
    and of stacked arrays too, which the type checker of the tests refuses. This one does not.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    names = tuple(field.name for field in fields if not field.metadata.get("static"))
    constants = tuple(field.name for field in fields if field.metadata.get("static"))

    def flatten(tree: T):
        kept = tuple(getattr(tree, name) for name in constants)
        return tuple(getattr(tree, name) for name in names), kept

    def flatten_with_keys(tree: T):
        children, kept = flatten(tree)
        return tuple(zip(map(GetAttrKey, names), children, strict=True)), kept

    def unflatten(kept, children) -> T:
        tree = object.__new__(cls)
        for name, child in zip((*names, *constants), (*children, *kept), strict=True):
            object.__setattr__(tree, name, child)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
