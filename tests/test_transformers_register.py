"""register(): light, repeatable, in any order."""

import subprocess
import sys

import pytest

CHECKS = {
    "the package does not import transformers": """
import sys, sink_attention_ext
assert "transformers" not in sys.modules
""",
    "the adapter does not import transformers before register": """
import sys
from sink_attention_ext.integrations.transformers import register
assert "transformers" not in sys.modules
register()
assert "transformers" in sys.modules
assert not any(name.startswith("transformers.models.gpt_oss") for name in sys.modules)
""",
    "register may come before and after models are imported, and again": """
from sink_attention_ext.integrations.transformers import register
register()
from transformers import LlamaConfig, LlamaForCausalLM
register()
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, attn_implementation="sink_attention")
model = LlamaForCausalLM(config)
assert model.config._attn_implementation == "sink_attention"
""",
    "without register the name is refused": """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, attn_implementation="sink_attention")
try:
    LlamaForCausalLM(config)
except ValueError as error:
    assert "sink_attention" in str(error)
else:
    raise AssertionError
""",
}


@pytest.mark.parametrize("name", CHECKS)
def test_in_a_fresh_interpreter(name):
    subprocess.run([sys.executable, "-c", CHECKS[name]], check=True)
