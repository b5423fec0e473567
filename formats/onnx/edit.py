"""Changes to a graph, collected and made at once: nodes after a node, initializers, inputs, constants used once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptc.formats.onnx.model import Array, Model, onnx_module, tensor_proto

DOMAIN = "adaptc"  # of model-local functions


class Edit:
    """What is to be added to `model`; `finish` does it and leaves the nodes in topological order."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._helper = onnx_module().helper
        self._after: dict[int, list[Any]] = {}
        self._first: list[Any] = []
        self._constants: set[str] = set()
        self._functions: dict[str, Any] = {f.name: f for f in model.proto.functions if f.domain == DOMAIN}
        self._count = sum(n.name.startswith("adaptc/") for n in model.graph.node)

    def node(self, op: str, inputs: Sequence[str], output: str = "", domain: str = "", outputs: int = 1,
             **attributes: Any) -> tuple[Any, str]:
        """Return a new node, not yet placed, and its (first) output."""
        self._count += 1
        name = f"adaptc/{self._count}"
        outs = [output or name] + [f"{name}/{i}" for i in range(1, outputs)]
        return self._helper.make_node(op, list(inputs), outs, name=name, domain=domain, **attributes), outs[0]

    def constant(self, name: str, array: Array) -> str:
        """Return the name of an initializer with these values, added once."""
        if name not in self._constants and name not in self.model.initializers:
            self.initializer(name, array)
        self._constants.add(name)
        return name

    def initializer(self, name: str, array: Array) -> str:
        """Add an initializer and return its name."""
        self.model.graph.initializer.append(tensor_proto(name, array))
        return name

    def input(self, name: str, dtype: int, dims: Sequence[int | str]) -> None:
        """Add a graph input; dims may be names."""
        self.model.graph.input.append(self._helper.make_tensor_value_info(name, dtype, list(dims)))

    def function(self, proto: Any) -> None:
        """Add a model-local function once, and its domain."""
        self._functions.setdefault(proto.name, proto)

    def after(self, node: Any, *nodes: Any) -> None:
        """Place nodes right after one of the graph's."""
        self._after.setdefault(id(node), []).extend(nodes)

    def first(self, *nodes: Any) -> None:
        """Place nodes before all others; nodes of the graph among them move there."""
        self._first.extend(nodes)

    def replace_output(self, node: Any) -> tuple[str, str]:
        """Rename the first output of `node`; return (its new name, the old one for a later node to produce)."""
        old = node.output[0]
        node.output[0] = f"{old}/base"
        return node.output[0], old

    def finish(self) -> None:
        """Make the changes and drop initializers that nothing reads any more."""
        graph = self.model.graph
        nodes, moved = [*self._first], {id(n) for n in self._first}
        for node in graph.node:
            if id(node) in moved:
                continue
            nodes += [node, *self._after.get(id(node), ())]
        kept = [type(n).FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        _drop_unused(graph)
        del self.model.proto.functions[:]
        self.model.proto.functions.extend(self._functions.values())
        if self._functions and all(o.domain != DOMAIN for o in self.model.proto.opset_import):
            self.model.proto.opset_import.add(domain=DOMAIN, version=1)
        for cached in ("initializers", "value_info", "inputs"):
            self.model.__dict__.pop(cached, None)


def _drop_unused(graph: Any) -> None:
    read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output} | {i.name for i in graph.input}
    for node in graph.node:  # bodies of If and Loop read from the graph around them
        for a in node.attribute:
            for body in (a.g, *a.graphs):
                read |= _reads(body)
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in read:
            del graph.initializer[i]


def _reads(body: Any) -> set[str]:
    out = {i for n in body.node for i in n.input} | {o.name for o in body.output}
    for node in body.node:
        for a in node.attribute:
            for inner in (a.g, *a.graphs):
                out |= _reads(inner)
    return out


def int64(*values: int) -> Array:
    """Return a vector of int64."""
    return np.array(values, np.int64)
