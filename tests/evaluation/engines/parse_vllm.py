"""What vLLM's own command line makes of `vllm serve` with each list of words, as JSON.

Usage: python parse_vllm.py '[["WORD", ...], ...]'
"""

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

names = ("model_tag", "port", "revision", "speculative_config")
found = [make_arg_parser(FlexibleArgumentParser()).parse_args(words) for words in json.loads(sys.argv[1])]
print(json.dumps([{name: getattr(each, name) for name in names} for each in found]))
