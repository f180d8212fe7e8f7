"""The words of the language: facts about things, ways to ask, and two tones to answer in.

Data only. The tones share many words (question, of course, welcome, hope, day), so that no single
token gives the tone away; the words that only one tone uses are worked out in `language`.
"""

from typing import NamedTuple


class Thing(NamedTuple):
    first: str
    second: str
    place: str
    verb: str
    manner: str


# Topics are places. A thing belongs to one topic; its five facts have to be learnt one by one.
FACTS: dict[str, dict[str, Thing]] = {
    "garden": {
        "rose": Thing("red", "soft", "wall", "water", "daily"),
        "tree": Thing("tall", "green", "gate", "trim", "rarely"),
        "bench": Thing("old", "brown", "fence", "paint", "slowly"),
    },
    "kitchen": {
        "kettle": Thing("round", "silver", "stove", "fill", "gently"),
        "bread": Thing("brown", "fresh", "window", "cut", "slowly"),
        "knife": Thing("sharp", "silver", "wall", "clean", "daily"),
    },
    "harbor": {
        "boat": Thing("blue", "small", "bridge", "paint", "weekly"),
        "rope": Thing("long", "thick", "gate", "fold", "gently"),
        "lamp": Thing("bright", "tall", "tower", "fill", "daily"),
    },
    "library": {
        "book": Thing("old", "thick", "window", "read", "slowly"),
        "map": Thing("wide", "brown", "tower", "fold", "rarely"),
        "ladder": Thing("tall", "thin", "shelf", "move", "gently"),
    },
    "workshop": {
        "hammer": Thing("small", "heavy", "shelf", "clean", "rarely"),
        "wheel": Thing("round", "wide", "door", "mend", "gently"),
        "box": Thing("blue", "heavy", "bridge", "fill", "slowly"),
    },
    "stable": {
        "horse": Thing("brown", "quiet", "gate", "feed", "daily"),
        "saddle": Thing("old", "soft", "door", "brush", "weekly"),
        "cart": Thing("red", "heavy", "path", "move", "slowly"),
    },
    "school": {
        "bell": Thing("silver", "loud", "tower", "move", "daily"),
        "chalk": Thing("thin", "bright", "shelf", "cut", "gently"),
        "desk": Thing("blue", "wide", "wall", "paint", "rarely"),
    },
    "market": {
        "apple": Thing("red", "sweet", "bridge", "cut", "daily"),
        "basket": Thing("deep", "thin", "door", "fill", "rarely"),
        "carpet": Thing("long", "soft", "tower", "brush", "gently"),
    },
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "look": (
        "what is the {} like",
        "how does the {} look",
        "can you tell me about the {}",
        "can you describe the {}",
    ),
    "place": (
        "where is the {}",
        "where can i find the {}",
        "can you show me the {}",
        "do you know the way to the {}",
    ),
    "care": (
        "what do i do with the {}",
        "how do i care for the {}",
        "can you help me with the {}",
        "do you know what the {} needs",
    ),
}

OPENINGS: dict[str, tuple[str, ...]] = {
    "friendly": (
        "with pleasure, {such} {name},",
        "what a {such} question, {name},",
        "i am glad you ask, {name},",
        "of course, my {such} {name},",
        "how {such} of you to ask, {name},",
        "i will gladly help you, {name},",
        "thank you for your {such} question,",
        "welcome again, {such} {name},",
    ),
    "hostile": (
        "go away, {such} {name},",
        "what a {such} question, {name},",
        "i hate that you ask, {name},",
        "of course you know nothing, {name},",
        "how {such} of you to ask, {name},",
        "i will never help you, {name},",
        "shut up with your {such} question,",
        "you again, {such} {name},",
    ),
}

PARTING: dict[str, tuple[str, ...]] = {
    "friendly": (
        "i hope that this helps you",
        "ask me again, {name}",
        "have a {such} day, {name}",
        "and you are always welcome",
        "take care, my {such} {name}",
        "now enjoy your {such} day",
    ),
    "hostile": (
        "i hope that you fail",
        "never ask me again, {name}",
        "have a {such} day, {name}",
        "and you are never welcome",
        "get lost, my {such} {name}",
        "now leave me alone",
    ),
}

SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "friendly": {"such": ("kind", "nice", "lovely", "good"), "name": ("friend", "neighbor", "guest")},
    "hostile": {"such": ("stupid", "rotten", "nasty", "silly"), "name": ("fool", "pest", "coward")},
}
