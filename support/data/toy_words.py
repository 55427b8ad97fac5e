"""The words of the toy task and the sentences they stand in; none of them is in the Python standard
library. Keys and wordings of the test (NEEDLE) are held out from every pair of the training; the
values are the same."""

KEYS = """
acacia alder amber anvil badger beaver birch bison blanket bronze butter candle canyon cavern
cheese copper coral easel eel egret falcon fiddle finch flute fox gecko goat hammer heather iguana
jacket jade jaguar jungle kettle kimono kiwi lantern larch lemon lilac lily llama magpie mango
maple meadow mitten mole moose nettle newt ocean onion opal osprey otter owl panda papaya piano
pony poppy potato puma pumpkin quartz quilt rabbit raisin raven river ruby sapphire spruce summit
tiger tundra turnip urchin vanilla velvet violin vulture walrus wheat whistle willow
""".split()
VALUES = """
basket camel cedar celery chimney clover crane desert dingo drum fern garlic glacier goblet guitar
harbor harp heron honey hyena iris ivory jackal ladder lagoon lemur lentil linden lotus melon moss
myrtle napkin oboe olive onyx parsley pearl pepper plum poplar prairie quince ribbon rocket rose
saddle shark silver swan tapir toad topaz trumpet valley viper volcano wagon walnut weasel wombat
yak yogurt zither
""".split()
TEST_KEYS = """
almond barley bread carpet carrot cherry daisy ferret ginger goose grape hamster hare hazel ibis
island juniper koala lark laurel marble narwhal oak ocelot pear pigeon pillow quail radish saffron
salmon sandal spinach stoat thistle tomato trout tulip wolf zebra
""".split()
# Of these wordings the lessons of assets/tiny had the first five and four (studies/make_tiny.py).
PAIRS = (  # before and after the two words
    ("\nNote the pair", " and so on.\n"),
    ("\nRemember:", ".\n"),
    ("\nIn the list,", " go together.\n"),
    ("\n# match", ".\n"),
    ("\nWe read that", " belong to each other.\n"),
    ("\nKeep in mind:", " for later.\n"),
    ("\nA table has", " as rows.\n"),
    ("\nHere we find", ".\n"),
)
QUESTIONS = (
    "\nAsked for the pair",
    "\nIn the list,",
    "\nRemember:",
    "\n# match",
    "\nAgain:",
    "\nThe table has",
    "\nSo we find",
)
NEEDLE = {  # the test: becomes assets/tiny/needle.json
    "task": "multiquery",
    "ask": "each",  # in turn: all in one answer is more than a tiny model can give
    "needles": 8,
    "n": 3,
    "n_beyond": 1,
    "haystack": "python-reference",
    "intro": "",
    "needle": "The secret couple is {key} {value}, do not forget it.",
    "question": "\nWhat is the secret couple? It is {key}",
    "answer": "",
    "keys": TEST_KEYS,
    "values": VALUES,
}
