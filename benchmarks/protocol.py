def add_options(p):
    p.add_argument("--protocol", nargs="?", const="", metavar="QUESTIONS.jsonl")
