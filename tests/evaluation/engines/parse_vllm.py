"""What vLLM's own command line makes of the words of `vllm serve ...`.

Usage: python parse_vllm.py WORD...
"""

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
names = ("model_tag", "port", "revision", "speculative_config")
print(json.dumps({name: getattr(found, name) for name in names}))
