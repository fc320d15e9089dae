"""OPTIMA: distils a CoCa teacher into a small CoCa student, one module at a time, chosen by a bandit."""
