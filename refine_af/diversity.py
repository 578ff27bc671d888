"""What instructions ask for: the leading verb and its object.

Self-Instruct (Wang et al., https://arxiv.org/abs/2212.10560) shows the diversity of a set by the
root verb of each instruction and the verb's direct object, found with a neural parser. Here a
small word-list heuristic does the same for English without any model:

1. clauses that only set the scene ("Given a list of numbers, ...", "My sister has a new job.")
   and openers ("please", "can you", "your task is to") are passed over;
2. the verb is the next word, in lower case; of a question that is the question word, and what
   begins with a determiner or a pronoun ("The sky is blue.") has none;
3. the object is the last word of the first noun phrase behind it: determiners, pronouns and
   prepositions before the phrase are passed over, and the phrase ends at a preposition, a
   conjunction, a relative or auxiliary word, a participle or punctuation. A regular plural
   becomes singular.

It errs where only grammar helps: "Explain gravity briefly" gives (explain, briefly), and a command
behind a context clause without punctuation is not found.
"""

import re
from collections import Counter
from collections.abc import Iterable

_WORD_OR_MARK = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[^\w\s]")
_OPENING_MARKS = frozenset("\"'“‘<([{*")  # noqa: RUF001

# Clauses that give context; the command follows their punctuation.
_SCENE = re.compile(
    r"(?:(?:given|if|when you|for|in|from|with|using|as|after|before|while|because|since|although"
    r"|based on|according to|suppose|imagine|assume|consider the following"
    r"|you(?:'re| are| will be) (?:given|provided|presented|a|an)"
    r"|here (?:is|are)|below (?:is|are)|there (?:is|are))\b[^,.:;!?]*[,.:;!?]"
    r"|(?:i|we|my|our|he|she|it|they|a|an|the|this|these|one|two|three)\b[^.!?]*[.!?])\s*(?=\w)",
    re.IGNORECASE,
)

_OPENER = re.compile(
    r"(?:please|kindly|just|only|and|now|then|also|first|next|finally|so"
    r"|(?:can|could|would|will) you|you (?:should|must|need to|have to|are (?:asked|required) to)"
    r"|i (?:want|need|would like) you to|i'd like you to"
    r"|(?:your|the) (?:task|job|goal) is to|help me(?: to)?|try to|let's"
    r"|(?:at|for|from|in|of|on|to|with)(?= (?:how|what|which|whom|whose)\b))\b[\s,:]*(?=\w)",
    re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PREPOSITIONS = _words(
    "about above across after against along among around as at before behind below beneath beside"
    " between beyond by down during except for from in inside into like near of off on onto out"
    " outside over per regarding since through throughout to toward towards under until up upon"
    " versus via with within without"
)
_LINKS = _words(
    "and or but nor so than then because if whether while unless although that which who whom whose"
    " what when where why how"
)
_AUXILIARIES = _words(
    "am is are was were be been being do does did have has had can could will would shall should"
    " may might must isn't aren't doesn't don't didn't can't"
)
_PARTICIPLES = _words(
    "asking based beginning called comparing consisting containing covering describing ending"
    " explaining expressing featuring focusing given highlighting including introducing involving"
    " listing made mentioned named needed outlining provided related required showing shown"
    " starting stating suggesting summarizing summarising titled used using written"
)
_DETERMINERS = _words(
    "a an the this that these those my your his her its our their me you him them us it i we they"
    " he she there some any each every all both either neither no not one two three four five six"
    " seven eight nine ten many much more most several few least only also just"
)
_PHRASE_ENDS = _PREPOSITIONS | _LINKS | _AUXILIARIES | _PARTICIPLES
_BEFORE_PHRASE = _PREPOSITIONS | _LINKS | _AUXILIARIES | _DETERMINERS

_SAME_IN_PLURAL = _words(
    "always atlas bias canvas chaos christmas cons gas lens mathematics news perhaps physics pros"
    " series species"
)
_IRREGULAR = {"movies": "movie", "cookies": "cookie", "calories": "calorie", "people": "person"}


def verb_object(instruction: str) -> tuple[str, str]:
    """Leading verb and object of an English instruction, both in lower case.

    "Please write a short story about a cat." gives ("write", "story"), "What is the capital of
    France?" gives ("what", "capital").

    Returns:
        The verb and the object, each "" when there is none.
    """
    words = _WORD_OR_MARK.findall(_command(instruction).lower())
    position = next((i for i, word in enumerate(words) if word[0].isalpha()), None)
    if position is None or words[position] in _DETERMINERS:
        return "", ""
    return words[position], _object(words[position + 1 :])


def verb_object_counts(instructions: Iterable[str]) -> Counter[tuple[str, str]]:
    """How many instructions have each (verb, object); those without a verb are left out."""
    pairs = map(verb_object, instructions)
    return Counter(pair for pair in pairs if pair[0])


def _command(instruction: str) -> str:
    """The instruction from its command on: scene-setting clauses and openers cut off."""
    text = instruction.strip().replace("’", "'")  # noqa: RUF001
    while match := _OPENER.match(text) or _SCENE.match(text):
        text = text[match.end() :]
    return text


def _object(words: list[str]) -> str:
    """Head of the first noun phrase in the words and marks that follow a verb."""
    head = ""
    for word in words:
        is_word = word[0].isalpha()
        if not is_word and (head or word not in _OPENING_MARKS):
            break
        if head and word in _PHRASE_ENDS:
            break
        if is_word and word not in _BEFORE_PHRASE:
            head = word
    return _singular(head.removesuffix("'s"))


def _singular(noun: str) -> str:
    """The noun without the ending of a regular plural."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if len(noun) < 4 or noun in _SAME_IN_PLURAL or re.search("[isu']s$", noun):
        return noun
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    return re.sub(r"(?:(ch|sh|x|ss|zz)es|s)$", r"\1", noun)
