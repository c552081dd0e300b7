"""Dense definitions of ``regions.attn``."""

from __future__ import annotations

from typing import Any

import torch
from library.records import Case, Points, Setup, flags, floats, ids_of, ints, light, small

Tensor = torch.Tensor
Generator = torch.Generator


def draw(**spec: Any) -> Any:
    """Builder of random tensors: ``name=(dimensions, n)`` ints below n, ``(dimensions, share)`` flags, or floats.

    A dimension is a letter of "BHGQK" (G is a key head) or a number.
    """

    def make(setup: Setup, g: Generator) -> dict[str, Any]:
        s = setup.shape
        sizes = {"B": s.B, "H": s.H, "G": s.Hkv, "Q": s.Lq, "K": s.Lk}
        out: dict[str, Any] = {}
        for name, (dims, kind) in spec.items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in dims)
            if kind == "float":
                out[name] = floats(shape, g)
            elif kind == "positive":
                out[name] = torch.rand(shape, generator=g) + 0.25
            else:
                out[name] = flags(shape, kind, g) if isinstance(kind, float) else ints(0, kind, shape, g)
        return out

    return make


def task_memory(p: Points) -> Tensor:
    task = p.listed("task")
    images = {j for j, t in enumerate(task) if t == 0}
    return p.rows(lambda i: images | {j for j, t in enumerate(task) if t == task[i]})


def make_tasks(setup: Setup, g: Generator) -> dict[str, Any]:
    """Image tokens, one class token for each of two tasks, and their memories after the queries."""
    tail = [1, 2, 1, 1, 2, 2, 2]
    return {"task": torch.tensor([0] * (setup.shape.Lk - len(tail)) + tail, dtype=torch.int32)}


def prompt_roles(p: Points) -> Tensor:
    role, prompt, assigned = (p.listed(name) for name in ("role", "prompt", "assigned"))

    def seen(b: int, i: int, j: int) -> bool:
        if role[j] == 2:
            return role[i] == 0
        if role[j] == 3:
            return role[i] == 1 and assigned[b][i][prompt[j]]
        return True

    return p.pairs("b", seen)


def make_roles(setup: Setup, g: Generator) -> dict[str, Any]:
    role = [0, *[2] * 3, *[3] * 4, *[1] * (setup.shape.Lk - 8)]
    prompt = [0] * 4 + list(range(4)) + [0] * (setup.shape.Lk - 8)
    return {
        "role": torch.tensor(role, dtype=torch.int32),
        "prompt": torch.tensor(prompt, dtype=torch.int32),
        "assigned": flags((setup.shape.B, setup.shape.Lq, 4), 0.5, g),
    }


def causal_cross(p: Points) -> Tensor:
    limit = p.listed("available")
    return torch.stack([p.rows(lambda i, b=b: range(limit[b][i] + 1)) for b in range(p.shape.B)])[:, None]


def prompt_schedule(p: Points) -> Tensor:
    allowed = p.tensors["allowed"][p.tensors["group"].long()]
    content = p.tensors["content"] if p["step"] < p["switch"] else torch.ones_like(p.tensors["content"])
    return (allowed & content)[:, None, None]


def one_hot(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(x.long(), n).double()


def matching(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Whether two labels are equal, by one-hot products, [B, 1, Lq, Lk]."""
    return (one_hot(x, n) @ one_hot(y, n).transpose(-1, -2)).bool()[:, None]


def bounded(rows: str, columns: str) -> Any:
    def mask(p: Points) -> Tensor:
        x, y = p.tensors[rows], p.tensors[columns]
        return matching(x, y, 4) | (x == 0)[:, None, :, None] | (y == 0)[:, None, None, :]

    return mask


def make_predicted(setup: Setup, g: Generator) -> dict[str, Any]:
    """Masks predicted by an earlier layer; two rows are empty."""
    s = setup.shape
    seen = flags((s.B, s.Lq, s.Lk), 0.3, g)
    seen[:, 1] = False
    seen[0, 4] = False
    return {"seen": seen, "empty": ~seen.any(-1)}


def masked_cross(p: Points) -> Tensor:
    seen = p.tensors["seen"].clone()
    for row in seen.view(-1, p.shape.Lk):
        if not row.any():
            row[:] = True
    return seen[:, None]


def by_table(kind: Tensor, table: Tensor) -> Tensor:
    n = table.shape[0]
    return (one_hot(kind, n) @ table.double() @ one_hot(kind, n).transpose(-1, -2)).bool()[:, None]


def concept_tokens(p: Points) -> Tensor:
    table = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1]]).bool()  # rows: image, prompt and concept queries
    return by_table(p.tensors["kind"], table)


def isolation(p: Points) -> Tensor:
    subject, first = p.listed("subject"), p["references"]

    def seen(b: int, i: int, j: int) -> bool:
        mine, theirs = subject[b][first + i], subject[b][j]
        if j < first:
            return mine != 0 and mine == theirs
        return not (mine > 0 and theirs > 0 and mine != theirs)

    return p.pairs("b", seen)


def make_conditions(setup: Setup, g: Generator) -> dict[str, Any]:
    """Three text tokens, nine image tokens, nine of a spatial condition and twice four of subjects."""
    kind = [0] * 3 + [1] * 9 + [2] * 9 + [3] * 8
    place = [0] * 3 + list(range(9)) * 2 + [0] * 8
    condition = [0] * 21 + [0] * 4 + [1] * 4
    names = {"kind": kind, "place": place, "condition": condition}
    out = {n: torch.tensor([x] * setup.shape.B, dtype=torch.int32) for n, x in names.items()}
    return {**out, "active": flags((setup.shape.B, 2, 9), 0.5, g)}


def position_keyword(p: Points) -> Tensor:
    """Filled part by part."""
    active = p.tensors["active"]
    mask = p.false(p.shape.B, 1)
    text, image, spatial = slice(0, 3), slice(3, 12), slice(12, 21)
    mask[:, :, :12, :12] = True
    mask[:, :, image, spatial] = torch.eye(9).bool()
    mask[:, :, spatial, spatial] = torch.eye(9).bool()
    for c, part in enumerate((slice(21, 25), slice(25, 29))):
        mask[:, 0, image, part] = active[:, c, :, None]
        mask[:, :, part, part] = True
    assert not mask[:, :, text, 12:].any()
    return mask


def prompted_frames(p: Points) -> Tensor:
    frame = p.listed("frame")

    def sources(i: int) -> set[int]:
        return {-1, 0} if frame[i] <= 0 else {0, frame[i], frame[i] - 1}

    return p.rows(lambda i: [j for j, f in enumerate(frame) if f in sources(i)])


def make_concepts(setup: Setup, g: Generator) -> dict[str, Any]:
    pixels, b = setup.params["pixels"], setup.shape.B
    masks = torch.rand(b, 2, pixels, generator=g) * flags((b, 2, pixels), 0.6, g)
    return {"weight": floats((2,), g), "concept": masks}


def references(p: Points) -> Tensor:
    own = torch.ones(p.shape.B, p["pixels"], dtype=torch.bool)
    return torch.cat([own, p.tensors["concept"].flatten(1) > 0], 1)[:, None, None]


def references_score(s: Tensor, p: Points) -> Tensor:
    weight, concept = p.floats("weight", "concept")
    bias = torch.cat([torch.zeros(p.shape.B, p["pixels"]).double(), (weight[:, None] * concept).flatten(1)], 1)
    return s + bias[:, None, None]


def part_projection(p: Points) -> Tensor:
    chosen = one_hot(p.tensors["part"], p.tensors["hit"].shape[1]) @ p.tensors["hit"].double()
    return chosen.bool()[:, None]


def keys(name: str) -> Any:
    return lambda p: p.tensors[name][:, None, None]


def kept_patches(p: Points) -> Tensor:
    kept = p.tensors["keep"].clone()
    kept[:, 0] = True
    return kept[:, None, None]


def onion_peel(p: Points) -> Tensor:
    return torch.einsum("bq,bk->bqk", p.tensors["peel"].int(), p.tensors["valid"].int()).bool()[:, None]


def make_similarity(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    similarity = floats((s.B, s.Lq, s.Lk), g)
    return {"similarity": similarity, "threshold": similarity.topk(s.Lk // 2, -1).values[..., -1]}


def similar_half(p: Points) -> Tensor:
    best = p.tensors["similarity"].argsort(-1, descending=True)[..., : p.shape.Lk // 2]
    return torch.zeros(p.shape.B, p.shape.Lq, p.shape.Lk).scatter(-1, best, 1.0).bool()[:, None]


def subject_region(p: Points) -> Tensor:
    subject, region = p.tensors["subject"], p.tensors["region"]
    return ~(subject[:, None, :] & ~region[:, :, None])[:, None]


def duplex_score(s: Tensor, p: Points) -> Tensor:
    inner, cross = p.floats("inner", "cross")
    same = matching(p.tensors["modality"], p.tensors["modality"], 3)
    return s + same * inner[:, None, None] + ~same * cross[:, None, None]


def entity_groups(p: Points) -> Tensor:
    none = (p.tensors["entity"] == 0)[:, None, None]
    return matching(p.tensors["group"], p.tensors["entity"], 4) | none


_BK = ("B", "K")

CASES: dict[str, Case] = {
    "task_memory": light("task_memory", small(24, 29), task_memory, tensors=make_tasks),
    "prompt_roles": light("prompt_roles", small(20), prompt_roles, tensors=make_roles),
    "causal_cross": light("causal_cross", small(15, 22), causal_cross, tensors=draw(available=(("B", "Q"), 20))),
    "prompt_schedule": light(
        "prompt_schedule",
        small(12, 21, step=3, switch=7),
        prompt_schedule,
        tensors=draw(content=(_BK, 0.7), group=(("K",), 4), allowed=((4,), 0.7)),
    ),
    "bounded_self": light("bounded_self", small(24), bounded("subject", "subject"), tensors=draw(subject=(_BK, 4))),
    "bounded_cross": light(
        "bounded_cross", small(24, 13), bounded("subject", "word"), tensors=draw(subject=(("B", "Q"), 4), word=(_BK, 4))
    ),
    "masked_cross": light("masked_cross", small(11, 24), masked_cross, tensors=make_predicted),
    "visibility": light(
        "visibility",
        small(21),
        lambda p: by_table(p.tensors["kind"], p.tensors["table"]),
        tensors=draw(kind=(_BK, 4), table=((4, 4), 0.6)),
    ),
    "group_knockout": light(
        "group_knockout",
        small(23),
        lambda p: p.tril() & ~by_table(p.tensors["group"], p.tensors["blocked"]),
        tensors=draw(group=(_BK, 3), blocked=((3, 3), 0.4)),
    ),
    "concept_tokens": light("concept_tokens", small(21), concept_tokens, tensors=draw(kind=(_BK, 3))),
    "isolation": light("isolation", small(12, 30, references=18), isolation, tensors=draw(subject=(_BK, 3))),
    "position_keyword": light("position_keyword", small(29), position_keyword, tensors=make_conditions),
    "prompted_frames": light(
        "prompted_frames",
        small(30),
        prompted_frames,
        tensors=lambda setup, g: {"frame": ids_of([4, 6, 7, 6, 7]) - 1},
    ),
    "references": light("references", small(9, 27, pixels=9), references, references_score, tensors=make_concepts),
    "image_memory": light(
        "image_memory",
        small(20, 14),
        lambda p: torch.stack(
            [torch.stack([p.tensors["position"][b] <= i for i in range(p.shape.Lq)]) for b in range(p.shape.B)]
        )[:, None],
        tensors=draw(position=(_BK, 18)),
    ),
    "part_projection": light(
        "part_projection",
        small(18, 15),
        part_projection,
        tensors=draw(part=(("B", "Q"), 4), hit=(("B", 4, "K"), 0.5)),
    ),
    "visible_keys": light("visible_keys", small(14, 22), keys("visible"), tensors=draw(visible=(_BK, 0.5))),
    "kept_patches": light("kept_patches", small(22), kept_patches, tensors=draw(keep=(_BK, 0.5))),
    "soft_patches": light(
        "soft_patches",
        small(22),
        score=lambda s, p: s + torch.log(p.floats("keep") + 1e-10)[:, None, None],
        tensors=draw(keep=(_BK, "positive")),
    ),
    "onion_peel": light(
        "onion_peel", small(20, 26), onion_peel, tensors=draw(peel=(("B", "Q"), 0.4), valid=(_BK, 0.6))
    ),
    "similar_half": light("similar_half", small(13, 18), similar_half, tensors=make_similarity),
    "subject_region": light(
        "subject_region", small(20, 13), subject_region, tensors=draw(subject=(_BK, 0.4), region=(("B", "Q"), 0.5))
    ),
    "duplex": light(
        "duplex",
        small(21),
        lambda p: p.tril() & by_table(p.tensors["modality"], p.tensors["allowed"]),
        duplex_score,
        tensors=draw(modality=(_BK, 3), allowed=((3, 3), 0.7), inner=(("H",), "float"), cross=(("H",), "float")),
    ),
    "entity_groups": light(
        "entity_groups", small(20, 13), entity_groups, tensors=draw(entity=(_BK, 4), group=(("B", "Q"), 4))
    ),
}
