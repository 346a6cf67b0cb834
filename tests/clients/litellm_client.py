"""litellm: a completion, a stream, and its own error for a prompt that is too long."""

import os

import litellm

asked = dict(model=f"openai/{os.environ['MODEL']}", api_base=os.environ["BASE_URL"], api_key="none", num_retries=0)
messages = [{"role": "user", "content": "name?"}]
answer = litellm.completion(**asked, messages=messages, temperature=0, max_tokens=24)
stream = litellm.completion(**asked, messages=messages, temperature=0, max_tokens=24, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
assert text == answer.choices[0].message.content, (text, answer)
try:
    litellm.completion(**asked, messages=[{"role": "user", "content": "ab" * 5000}])
except litellm.ContextWindowExceededError:
    print("all well")
