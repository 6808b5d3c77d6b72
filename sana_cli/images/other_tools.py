"""Read the settings and the tool's name from images of other tools.

ComfyUI         `prompt`, the graph that ran, and `workflow`, the one on the screen; in EXIF
                behind the words "prompt:" and "workflow:"
InvokeAI        `invokeai_metadata`; earlier `sd-metadata`, and `Dream`, a command line
SwarmUI         JSON with `sui_image_params`, in the place of A1111's text
Fooocus         JSON in the same place, or A1111's text, as `fooocus_scheme` says
NovelAI         `Comment`, JSON, beside `Software`
mflux           JSON in EXIF's UserComment
Easy Diffusion  a PNG text for each setting, or JSON in EXIF
Draw Things     JSON inside XMP
SD.Next, Forge, stable-diffusion.cpp and others write A1111's text
"""

import html
import json
import re
from collections.abc import Iterator
from typing import Any

from sana_cli.images import a1111
from sana_cli.images.claims import Claims

Texts = dict[str, list[str]]  # by PNG keyword or EXIF tag; several where the encoding is ambiguous

# Our fields by their names in other tools, in lower case and without separators.
FIELDS = {
    **dict.fromkeys(("prompt", "positiveprompt", "c"), "prompt"),
    **dict.fromkeys(("negativeprompt", "uc"), "negative"),
    **dict.fromkeys(("steps", "numinferencesteps"), "steps"),
    **dict.fromkeys(("cfgscale", "guidancescale", "guidance", "scale", "cfg"), "guidance"),
    **dict.fromkeys(("sampler", "samplername"), "solver"),
    **dict.fromkeys(("model", "basemodel", "usestablediffusionmodel", "modelweights"), "model"),
    **dict.fromkeys(("size", "resolution"), "size"),
    **{name: name for name in ("seed", "width", "height")},
}
A1111_FIELDS = {
    **{"Steps": "steps", "Sampler": "solver", "CFG scale": "guidance", "Seed": "seed"},
    **{"Size": "size", "Model": "model"},
    **{"Flow shift": "flow_shift", "Denoising strength": "strength"},  # where they are ours
}
MAX_NODES = 10_000
MAX_STEPS = 1_000_000  # over nodes and inputs of a graph, where honest graphs take thousands
LONGEST_PATH = 50  # links between nodes


def read(texts: Texts) -> Claims | None:
    """Return the settings of the first tool whose format matches, or None."""
    for find in (
        _a1111,
        _swarm,
        _fooocus,
        _invokeai,
        _novelai,
        _mflux,
        _comfy,
        _easy_diffusion,
        _draw_things,
    ):
        if (claims := find(texts)) is not None:
            return claims
    return None


def _named(document: dict[str, Any]) -> list[tuple[str, str | None, Any]]:
    return [(key, FIELDS.get(re.sub(r"[\W_]", "", key).lower()), v) for key, v in document.items()]


def _json(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty if the text is not one."""
    if text[:1] != "{":
        return {}
    try:
        found = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _documents(texts: Texts, *places: str) -> Iterator[dict[str, Any]]:
    for place in places:
        yield from filter(None, map(_json, texts.get(place, ())))


COMMENTS = ("parameters", "UserComment", "ImageDescription", "comment")


# --- A1111's text ------------------------------------------------------------------------------


def _a1111(texts: Texts) -> Claims | None:
    for place in ("parameters", "UserComment", "comment"):
        for text in texts.get(place, ()):
            if found := a1111.read(text):
                pairs = [(name, A1111_FIELDS.get(name), v) for name, v in found.pairs.items()]
                rest = [("other text", None, "; ".join(found.rest))] if found.rest else []
                prompts = [
                    ("prompt", "prompt", found.prompt),
                    ("negative", "negative", found.negative),
                ]
                tool = _writer(found.pairs, texts)
                return Claims(tool, [*prompts, *pairs, *rest], is_a1111=True)
    return None


def _writer(pairs: dict[str, str], texts: Texts) -> str | None:
    """Identify the tool by features of its text."""
    version = pairs.get("Version", "")
    if pairs.get("App") == "SD.Next" or pairs.get("Pipeline") == "Original" or "Parser" in pairs:
        return f"SD.Next {version}".strip()
    if re.match(r"f\d|forge", version):
        return f"Forge {version}"
    if re.match(r"v\d", version):
        return f"A1111 {version}"
    if re.match(r"Fooocus|stable-diffusion\.cpp|ComfyUI|sana ", version):
        return version
    if re.search(r'"class_type"', "".join(texts.get("prompt", ()))):
        return "ComfyUI"
    return "Civitai" if "Civitai resources" in pairs else None


# --- one JSON document -------------------------------------------------------------------------


def _swarm(texts: Texts) -> Claims | None:
    for document in _documents(texts, *COMMENTS):
        found = document.get("sui_image_params")
        if isinstance(found, dict):
            version = found.get("swarm_version", "")
            return Claims(f"SwarmUI {version}".strip(), _named(found))
    return None


def _fooocus(texts: Texts) -> Claims | None:
    for document in _documents(texts, *COMMENTS):
        plain = {re.sub(r"\W", "_", key).lower(): value for key, value in document.items()}
        version = str(plain.get("version", ""))
        scheme = "fooocus" in texts.get("fooocus_scheme", ()) or "metadata_scheme" in plain
        if "fooocus" in version.lower() or (scheme and "base_model" in plain):
            return Claims(version or "Fooocus", _named(document))
    return None


def _invokeai(texts: Texts) -> Claims | None:
    for document in _documents(texts, "invokeai_metadata"):
        model = document.get("model")
        if isinstance(model, dict):
            name = model.get("name") or model.get("model_name") or model.get("key")
            document = document | {"model": name}
        return Claims(f"InvokeAI {document.get('app_version', '')}".strip(), _named(document))
    for document in _documents(texts, "sd-metadata"):
        image = document.get("image")
        image = image if isinstance(image, dict) else {}
        prompt = image.get("prompt")
        if isinstance(prompt, list):
            parts = [p.get("prompt") for p in prompt if isinstance(p, dict)]
            image = image | {"prompt": ", ".join(p for p in parts if isinstance(p, str))}
        more = {"model": document.get("model_weights")}
        return Claims(f"InvokeAI {document.get('app_version', '')}".strip(), _named(image | more))
    for text in texts.get("Dream", ()):
        if command := re.match(r'"((?:[^"\\]|\\.)*)"(.*)', text, re.DOTALL):
            flags = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "guidance"}
            flags |= {"A": "solver"}
            found = re.findall(r"(?:^|\s)-([a-zA-Z]) ?(\S+)", command[2])
            settings = [(f"-{flag}", flags.get(flag), value) for flag, value in found]
            return Claims("InvokeAI", [("prompt", "prompt", command[1]), *settings])
    if texts.get("invokeai_graph") or texts.get("invokeai_workflow"):
        return Claims("InvokeAI")
    return None


def _novelai(texts: Texts) -> Claims | None:
    about = texts
    for document in _documents(
        texts, "UserComment"
    ):  # a WebP has in EXIF what a PNG has in text chunks
        if isinstance(document.get("Comment"), str):
            about = {key: [text] for key, text in document.items() if isinstance(text, str)}
    if not any(text.startswith("NovelAI") for text in about.get("Software", ())):
        return None
    source = {"model": next(iter(about.get("Source", ())), None)}
    described = {"prompt": next(iter(about.get("Description", ())), None)}
    for document in _documents(about, "Comment"):
        return Claims("NovelAI", _named(described | source | document))
    return Claims("NovelAI", _named(described | source))


def _mflux(texts: Texts) -> Claims | None:
    for document in _documents(texts, *COMMENTS):
        if "mflux_version" in document:
            return Claims(f"mflux {document['mflux_version']}", _named(document))
    return None


def _easy_diffusion(texts: Texts) -> Claims | None:
    flat = {key: some[0] for key, some in texts.items() if some}
    for document in (flat, *_documents(texts, "UserComment")):
        if "prompt" in document and {"use_stable_diffusion_model", "num_inference_steps"} & set(
            document
        ):
            return Claims("Easy Diffusion", _named(document))
    return None


def _draw_things(texts: Texts) -> Claims | None:
    for text in texts.get("xmp", ()):
        for before in text.split("</rdf:li>")[:-1]:
            inner = before.rpartition("<rdf:li")[2].partition(">")[2].strip()
            try:
                document = _json(html.unescape(inner))
            except ValueError:  # of a character with more digits than Python converts
                continue
            if "c" in document and "sampler" in document:
                return Claims("Draw Things", _named(document))
    return None


# --- ComfyUI's graph ---------------------------------------------------------------------------

Node = dict[str, Any]


def _comfy(texts: Texts) -> Claims | None:
    graphs = [*_documents(texts, "prompt"), *_behind_words(texts, "prompt")]
    graphs += [
        d["prompt"] for d in _documents(texts, *COMMENTS) if isinstance(d.get("prompt"), dict)
    ]
    for graph in graphs:
        nodes = {key: node for key, node in graph.items() if isinstance(node, dict)}
        if len(nodes) <= MAX_NODES and any("class_type" in node for node in nodes.values()):
            return Claims("ComfyUI", _Graph(nodes).settings())
    screens = [*_documents(texts, "workflow"), *_behind_words(texts, "workflow")]
    return Claims("ComfyUI") if any("nodes" in screen for screen in screens) else None


def _behind_words(texts: Texts, word: str) -> Iterator[dict[str, Any]]:
    for place in ("Make", "Model", "ImageDescription", "UserComment"):
        for text in texts.get(place, ()):
            if text.lower().startswith(f"{word}:"):
                yield _json(text[len(word) + 1 :].strip())


class _Graph:
    """A graph of nodes whose inputs are values or links [node, output]."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.steps_left = MAX_STEPS

    def settings(self) -> list[tuple[str, str | None, Any]]:
        sampler = self._sampler()
        if sampler is None:
            return []
        latent = self._link(sampler, "latent_image") or {}
        settings = [
            ("prompt", "prompt", self._text(sampler, "positive")),
            ("negative", "negative", self._text(sampler, "negative")),
            ("seed", "seed", self._nearest(sampler, "seed", "noise_seed")),
            ("steps", "steps", self._nearest(sampler, "steps")),
            ("cfg", "guidance", self._nearest(sampler, "cfg")),
            ("sampler_name", "solver", self._nearest(sampler, "sampler_name")),
            ("scheduler", None, self._nearest(sampler, "scheduler")),
            ("denoise", None, self._nearest(sampler, "denoise")),
            ("width", "width", self._nearest(latent, "width")),
            ("height", "height", self._nearest(latent, "height")),
            ("model", "model", self._nearest(sampler, "ckpt_name", "unet_name", "model_name")),
        ]
        if self.steps_left <= 0:
            settings.append(("graph", None, "has too many links to follow all"))
        return settings

    def _sampler(self) -> Node | None:
        """Return the sampler that starts from an empty latent, else the first one."""
        samplers = [
            node
            for _, node in sorted(self.nodes.items(), key=lambda item: (len(item[0]), item[0]))
            if "sampler" in _class(node) and self._link(node, "latent_image")
        ]
        for node in samplers:
            if "width" in _inputs(self._link(node, "latent_image") or {}):
                return node
        return samplers[0] if samplers else None

    def _link(self, node: Node, name: str) -> Node | None:
        return self._linked(_inputs(node).get(name))

    def _linked(self, value: Any) -> Node | None:
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            return self.nodes.get(str(value[0]))
        return None

    def _upwards(self, node: Node, through: str = "") -> Iterator[Node]:
        """Yield a node and all that it is computed from, the nearest first, while steps are left;
        a node that has an input called `through` is followed only along that."""
        level, seen = [node], {id(node)}
        for _ in range(LONGEST_PATH):
            above = []
            for node in level:
                inputs = _inputs(node)
                self.steps_left -= 1 + len(inputs)
                if self.steps_left <= 0:
                    return
                yield node
                for name in [through] if through in inputs else inputs:
                    linked = self._linked(inputs[name])
                    if linked is not None and id(linked) not in seen:
                        seen.add(id(linked))
                        above.append(linked)
            level = above

    def _nearest(self, start: Node, *names: str) -> Any:
        """Return the nearest value of those names, or the value of a node linked in its place."""
        for node in self._upwards(start):
            inputs = _inputs(node)
            for name in filter(inputs.__contains__, names):
                if _is_plain(inputs[name]):
                    return inputs[name]
                linked = self._linked(inputs[name])
                for above in self._upwards(linked) if linked is not None else ():
                    values = map(_inputs(above).get, (*names, *HOLDERS))
                    if (value := next(filter(_is_plain, values), None)) is not None:
                        return value
        return None

    def _text(self, sampler: Node, name: str) -> str | None:
        """Return the nearest text that a conditioning was computed from."""
        start: Any = _inputs(sampler).get(name)
        if start is None:  # of a sampler with a guider of its own
            guider = _inputs(self._link(sampler, "guider") or {})
            start = guider.get(name, guider.get("conditioning") if name == "positive" else None)
        linked = self._linked(start)
        for node in self._upwards(linked, name) if linked is not None else ():
            if (text := self._texts_of(node, (name, *TEXTS))) is not None:
                return text
        return start if isinstance(start, str) else None

    def _texts_of(self, node: Node, names: tuple[str, ...]) -> str | None:
        found = []
        for value in map(_inputs(node).get, names):
            linked = self._linked(value)
            if isinstance(value, str):
                found.append(value)
            elif linked is not None and "clip" not in _class(linked):
                strings = (self._strings(above) for above in self._upwards(linked))
                found += next(filter(None, strings), [])
        return "\n".join(dict.fromkeys(found)) if found else None

    def _strings(self, node: Node) -> list[str]:
        """Return the texts in a node: the result of its wildcards, or else all of them."""
        held = {
            k: v
            for k, v in _inputs(node).items()
            if isinstance(v, str) and HELD.search(k, 0, LONGEST_NAME)
        }
        return [held["populated_text"]] if "populated_text" in held else list(held.values())


TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt")  # of nodes that encode
HOLDERS = ("value", "int", "float", "number", "string")  # of nodes that hold a value
HELD = re.compile("text|string|prompt|value")
LONGEST_NAME = 100  # of which words are looked for


def _inputs(node: Node) -> dict[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _class(node: Node) -> str:
    name = node.get("class_type")
    return name[:LONGEST_NAME].lower() if isinstance(name, str) else ""


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
