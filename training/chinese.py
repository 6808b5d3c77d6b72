"""Chinese words of the captions, sentences of them, and Chinese captions of scenes and shapes."""

import re
from functools import cache

import numpy as np

from training import scenes, shapes
from training.captions import Caption, Pick, picker
from training.noto import things

COLOURS = {
    "red": ("红色",),
    "orange": ("橙色", "橘色"),
    "yellow": ("黄色",),
    "green": ("绿色",),
    "cyan": ("青色",),
    "blue": ("蓝色",),
    "purple": ("紫色",),
    "pink": ("粉色", "粉红色"),
    "brown": ("棕色", "褐色"),
    "black": ("黑色",),
    "white": ("白色",),
    "gray": ("灰色",),
}
KINDS = {  # measure word, names
    "house": ("座", ("房子", "房屋")),
    "tree": ("棵", ("树",)),
    "pine": ("棵", ("松树",)),
    "cactus": ("棵", ("仙人掌",)),
    "boat": ("艘", ("帆船",)),
    "bridge": ("座", ("桥", "拱桥")),
    "balloon": ("个", ("热气球",)),
    "cloud": ("朵", ("云", "云朵")),
    "bird": ("只", ("鸟", "小鸟")),
}
SHAPES = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星形", "五角星"),
    "heart": ("心形", "爱心"),
    "ring": ("圆环",),
    "cross": ("十字",),
    "hexagon": ("六边形",),
}
NUMBERS = {1: ("一", "一", "1"), 2: ("两", "两", "2"), 3: ("三", "三", "3")}
SIZES = {
    "small": ("小小的", "很小的", "小号的"),
    "medium": ("中等大小的", "中号的"),
    "large": ("大大的", "很大的", "大号的"),
}
WHEN = {
    "dawn": ("黎明时", "日出时", "清晨", "清晨的天空下"),
    "noon": ("中午", "白天", "晴天", "蓝天下"),
    "sunset": ("日落时", "傍晚", "黄昏时", "夕阳下"),
    "starry night": ("星空下", "繁星之夜", "满天星星的夜里"),
    "moonlit night": ("月光下", "月夜", "月明之夜"),
    "night": ("夜里", "晚上"),
}
LANDS = {
    "mountains": ("群山", "山脉", "大山"),
    "snowy mountains": ("雪山", "积雪的群山"),
    "hills": ("山丘", "丘陵"),
    "dunes": ("沙丘", "沙漠"),
    "sea": ("大海", "海洋"),
    "city": ("城市", "都市"),
}
PLACES = {
    "left": ("在左边", "在左侧"),
    "middle": ("在中间", "在中央"),
    "centre": ("在中间", "在中央"),
    "right": ("在右边", "在右侧"),
    "top": ("在上方", "在顶部"),
    "bottom": ("在下方", "在底部"),
}
RELATIONS = {
    "left of": ("在{}的左边", "在{}左侧"),
    "right of": ("在{}的右边", "在{}右侧"),
    "beside": ("在{}旁边", "挨着{}"),
    "above": ("在{}的上方", "在{}上方"),
    "below": ("在{}的下方", "在{}下面"),
    "on": ("站在{}上", "在{}的顶上"),
}
JOINTS = re.compile(" [-/] |[ ·，和与的有]")  # what states nothing between two parts of a caption
RANDOM = ((0x4E00, 0x9FA5), (0x61, 0x7A), (0x23, 0x2F))  # Chinese characters, letters, "#" to "/"
OPENINGS = ("", "", "", "画", "一幅画，", "图中是", "请看，", "我想要")


FRAME = """
有 的 在 和 与 上 里 前 旁 边 下 背景 纯 前面 上空 上方 下方 上面 下面 上半 下半 左边 右边 左半 右半
左侧 右侧 中间 中央 顶部 底部 旁边 挨着 站在 顶上 海边 海滩 沙滩 画 一幅画 图中是 请看 我想要
"""  # other words of the captions


def words() -> set[str]:
    """Return every word of the captions."""
    tables = (COLOURS, SHAPES, NUMBERS, SIZES, WHEN, LANDS)
    found = {word for table in tables for options in table.values() for word in options}
    names = [KINDS[kind] for kind in KINDS] + [(one.measure, one.chinese) for one in things()]
    return found.union(FRAME.split(), *((measure, *nouns) for measure, nouns in names))


def counted(count: int, measure: str, noun: str, pick: Pick) -> str:
    """Return a noun with numeral and measure word; a single one sometimes bare."""
    if count == 1 and pick(("bare", "counted", "counted", "counted")) == "bare":
        return noun
    return f"{pick(NUMBERS[count])}{measure}{noun}"


def joined(names: list[str], relation: str | None, pick: Pick) -> str:
    """Name one thing, or two with their relation."""
    if len(names) == 2 and relation:
        return names[0] + pick(RELATIONS[relation]).format(names[1])
    return pick(("和", "与", "和", "，")).join(names)


def setting(place: str, land: str, pick: Pick) -> str:
    """Place things of the "sky", "ground" or "sea" in a land."""
    name = pick(LANDS[land])
    if place == "sea":
        return f"{name}{pick(('上', '里'))}"
    if place == "sky":
        return f"{name}{pick(('上空', '上方'))}"
    if land == "sea":
        return pick((f"{name}边", "海边", "海滩上", "沙滩上"))
    return f"{name}{pick(('前', '前面', '里', '旁'))}"


def ground(colours: tuple[str, ...], axis: int, pick: Pick) -> str:
    first, last = pick(COLOURS[colours[0]]), pick(COLOURS[colours[-1]])
    if len(colours) == 1:
        return pick((f"{first}背景", f"{first}的背景", f"纯{first}背景"))
    if axis == 0:
        return pick((f"上面{first}下面{last}的背景", f"上半{first}、下半{last}的背景"))
    return pick((f"左边{first}右边{last}的背景", f"左半{first}、右半{last}的背景"))


def sentence(what: str, around: str, when: str, pick: Pick) -> str:
    """Arrange the parts of a caption, of which `around` and `when` may be empty."""
    opening = pick(OPENINGS)
    text = pick(
        (
            f"{opening}{what}，{when}，{around}",
            f"{opening}{what}，{around}，{when}",
            f"{when}，{around}有{what}" if around else f"{when}，{what}",
            f"{when}{around}，{what}",
            f"{opening}{when}{around}的{what}" if when + around else f"{opening}{what}",
        )
    )
    while "，，" in text:
        text = text.replace("，，", "，")
    return text.strip("，")


def on_ground(what: str, behind: str, pick: Pick) -> str:
    opening = pick(OPENINGS)
    return pick(
        (
            f"{opening}{what}，{behind}",
            f"{behind}上有{what}",
            f"{behind}上的{what}",
            f"{opening}{behind}前的{what}",
        )
    )


@cache
def fragments() -> list[str]:
    """Return the characters that occur in names and state nothing alone, as the 生 of 生日蛋糕."""
    names = [name for one in things() for name in one.chinese]
    names += [name for _, found in KINDS.values() for name in found]
    stated = {name for name in names if len(name) == 1}
    tables = (COLOURS, NUMBERS, SIZES, WHEN, LANDS, PLACES, RELATIONS)
    stated |= {c for table in tables for words in table.values() for word in words for c in word}
    return sorted({character for name in names for character in name} - stated)


def with_nonsense(text: str, rng: np.random.Generator) -> str:
    """Add random characters before or after a text, or put them in place of one of `JOINTS`.

    This teaches the encoder to ignore them. They touch the text or not, as Chinese has no spaces.
    """
    length = int(rng.integers(1, 7))
    if rng.random() < 0.35:
        noise = "".join(rng.choice(fragments(), length))
    else:
        first, last = RANDOM[int(rng.choice(len(RANDOM), p=(0.6, 0.2, 0.2)))]
        noise = "".join(chr(int(code)) for code in rng.integers(first, last + 1, length))
    joints = list(JOINTS.finditer(text))
    if joints and rng.random() < 0.5:
        start, end = joints[int(rng.integers(len(joints)))].span()
        return text[:start] + noise[:3] + text[end:]
    joint = str(rng.choice(["", "", " ", "，", ": ", "!"]))
    return joint.join([noise, text] if rng.random() < 0.5 else [text, noise])


def describe_scene(scene: scenes.Scene, rng: np.random.Generator) -> Caption:
    """Caption an illustrated scene, as `captions.candidate` does in English."""
    pick = picker(rng)
    groups, relation, facts = list(scene.groups), scene.relation, {}
    says_land, says_sky, says_colour = rng.random(3) < (0.62, 0.7, 0.85)
    says_relation = rng.random() < 0.8 or not scene.one_row
    if len(groups) == 2 and not says_relation and relation == "right of":
        groups.reverse()
    names = []
    for i, group in enumerate(groups, 1):
        measure, nouns = KINDS[group.kind]
        noun = pick(nouns)
        facts |= {f"kind {i}": group.kind, f"count {i}": str(group.count)}
        if says_colour and scenes.named_colours(group.kind):
            noun, facts[f"colour {i}"] = f"{pick(COLOURS[group.colour])}的{noun}", group.colour
        names.append(counted(group.count, measure, noun, pick))
    what = joined(names, relation if says_relation else None, pick)
    if len(groups) == 2 and relation and says_relation:
        facts["relation"] = relation
    if len(groups) == 1 and groups[0].place and (groups[0].place != "middle" or says_relation):
        what += pick(PLACES[groups[0].place])
        facts["place 1"] = groups[0].place
    around = when = ""
    if says_land or not groups:
        facts["land"] = scene.land
        kind = groups[0].kind if groups else ""
        where = {kind in scenes.SAILING: "sea", kind in scenes.FLYING: "sky"}.get(True, "ground")
        around = setting(where, scene.land, pick) if groups else pick(LANDS[scene.land])
    if says_sky:
        vague = scene.light == "night" and rng.random() < 0.3
        facts["sky"] = "night" if vague else scene.sky
        when = pick(WHEN[facts["sky"]])
    if not groups:
        return Caption(f"{when}的{around}" if when else around, facts)
    return Caption(sentence(what, around, when, pick), facts)


def describe_shapes(scene: shapes.Scene, rng: np.random.Generator) -> str:
    """Caption flat shapes with all of their facts, as `shapes.describe` does in English."""
    pick = picker(rng)
    names = []
    for one in scene.objects:
        size = pick(SIZES[one.size]) if one.size else ""
        noun = f"{size}{pick(COLOURS[one.colour])}{pick(('的', ''))}{pick(SHAPES[one.shape])}"
        names.append(counted(1, "个", noun, pick))
    what = joined(names, scene.relation, pick)
    position = scene.objects[0].position
    if position and not scene.relation:
        what += pick(PLACES[position])
    return on_ground(what, ground(scene.background, scene.axis, pick), pick)
