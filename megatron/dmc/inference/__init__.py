"""The inference engine: a model directory, a paged compressed cache, continuous batching. Imports no Megatron.

from megatron.dmc.inference import LLM, SamplingParams

llm = LLM("Llama-2-7B-DMC-4x")
print(llm.generate("The cache of", SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)
"""

from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.engine import Engine, EngineStats
from megatron.dmc.inference.errors import InvalidRequest
from megatron.dmc.inference.llm import LLM
from megatron.dmc.inference.request import Completion, Request, RequestOutput, StepOutput
from megatron.dmc.inference.sampler import Logprobs
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.structured_outputs import StructuredOutputsParams
