"""The OpenAI client of Python, unchanged: python openai_client.py URL"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
asked = {"model": model, "prompt": "def main(", "max_tokens": 5, "temperature": 0}
whole = client.completions.create(**asked)
assert whole.usage.completion_tokens == 5
assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True) if c.choices) == whole.choices[0].text
messages = [{"role": "user", "content": "hello"}]
chat = client.chat.completions.create(model=model, messages=messages, max_tokens=5, temperature=0)
assert chat.choices[0].message.role == "assistant"
with client.chat.completions.stream(model=model, messages=messages, max_tokens=5, temperature=0) as stream:
    said = "".join(event.delta for event in stream if event.type == "content.delta")
assert said == chat.choices[0].message.content
for wrong, error in (({"n": 1000}, openai.BadRequestError), ({"model": "nobody"}, openai.NotFoundError)):
    try:
        client.completions.create(**{**asked, **wrong})
    except error as found:
        assert found.code
    else:
        raise AssertionError(wrong)
print("ok")
