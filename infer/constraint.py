class Constraint:
    def __init__(self, *a):
        pass
