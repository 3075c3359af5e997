"""Where dynamo cut a model into several graphs."""

from __future__ import annotations

from pathlib import Path

from torch import fx


def graph_break(graph: fx.GraphModule) -> str:
    """Where dynamo cut the model after one of its graphs, and why; empty where it did not."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    words = str(reason.reason).strip().splitlines()
    why = words[0] if words else "no reason given"
    if not reason.user_stack:
        return why
    frame = reason.user_stack[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name} ({why})"
