from dataclasses import dataclass

from phi4rv.answers import parse_answer


@dataclass
class Delta:
    thinking: str = ""
    text: str = ""
    stopped: bool = False


class TextStream:
    def __init__(self, processor, mode, stop=()):
        self.processor, self.mode, self.ids = processor, mode, []

    def push(self, ids):
        self.ids += ids
        return Delta()

    def finish(self):
        return Delta()

    @property
    def thinking(self):
        return parse_answer(self.processor.decode(self.ids), self.mode).thinking

    @property
    def text(self):
        return parse_answer(self.processor.decode(self.ids), self.mode).text
