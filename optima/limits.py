"""What is too large to be honest: the bounds on everything that is read from files of others.

Each is far above what real data sets and models have, and low enough that no file can fill a machine's memory or hold
it up. SECURITY.md has the same numbers in a table. What exceeds one is refused in a line that names the bound.
"""

MAX_CONFIG_BYTES = 2**20
"""Bytes of a YAML configuration, or of a value on the command line."""

MAX_NESTING = 64
"""Brackets within brackets of a YAML configuration."""

MAX_JSON_BYTES = 2**30
"""Bytes of a JSON file that is read as a whole; the largest official annotations have half as many."""

MAX_LINE_BYTES = 2**24
"""Bytes of a line of a captions file: JSONL or TSV."""

MAX_VOCABULARY_BYTES = 2**26
"""Bytes of a tokenizer's file, unpacked."""

MAX_TEXT_CHARACTERS = 2000
"""Characters of the longest text that is taken for a caption, a question, a statement or an id."""

MAX_SHOWN_CHARACTERS = 300
"""Characters that a message shows of a name; the rest is cut."""

MAX_IMAGE_BYTES = 2**28
"""Bytes of the largest file, or member of a shard, that is taken for an image or its text."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded, a quarter of a GiB of RGB; Pillow's own limit for warnings."""

MAX_DECODED_BYTES = 2**28
"""Bytes that a decoder may need for an image: its pixels times what its format and mode take of each."""

MIN_SIDE = 8
"""Pixels of the shortest side that is taken; what is smaller is a tracking pixel or a rule, not an image."""

MAX_SOUND_SAMPLES = 2**26
"""Numbers in a sound's file, of all its channels together: 23 minutes of the two of a CD."""

MAX_TAR_NAME_BYTES = 2**16
"""Bytes of a member's name in an extension header of a tar."""

MAX_TAR_HEADER_BYTES = 2**20
"""Bytes of a pax header of a tar."""

MAX_SHARDS = 1_000_000
"""Tars of a split."""

MAX_REMOTE_SHARD_BYTES = 2**36
"""Bytes of a tar at an address."""

MAX_TRIES = 5
"""Tries to read a range of bytes over the network, before it counts as lost."""

MAX_WAIT_SECONDS = 60
"""Seconds that such a try may take."""

MAX_METADATA_BYTES = 2**20
"""Bytes of a model file's configuration, and of the description of its heads."""

MAX_LAYERS = 512
"""Layers of a module of a model."""

MAX_WIDTH = 2**16
"""Width of a module of a model, of its contrastive space, and number of a pooler's queries."""

MAX_MLP_RATIO = 64
"""Width of an MLP over the width of its model."""

MAX_IMAGE_SIDE = 2**14
"""Side of the square images of a model, pixels."""

MAX_VOCABULARY = 2**24
"""Tokens of a vocabulary, and classes of a head."""

MAX_TEXT_LENGTH = 2**16
"""Tokens in a row of text."""

MAX_HEADS = 64
"""Classification heads of a model."""
