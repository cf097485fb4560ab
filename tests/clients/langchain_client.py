"""LangChain's two OpenAI classes, unchanged: python langchain_client.py URL"""

import sys

from langchain_openai import ChatOpenAI, OpenAI

common = {"base_url": sys.argv[1], "api_key": "none", "model": "tiny", "max_retries": 0, "temperature": 0}
texts = OpenAI(**common, max_tokens=5)
whole = texts.invoke("def main(")
assert whole and "".join(texts.stream("def main(")) == whole
assert texts.batch(["def main(", "import os"])[0] == whole
chats = ChatOpenAI(**common, max_tokens=5)
answer = chats.invoke("hello")
assert answer.content and answer.usage_metadata["output_tokens"] == 5
assert "".join(chunk.content for chunk in chats.stream("hello")) == answer.content
print("ok")
