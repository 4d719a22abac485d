"""Telling others: events to webhooks, at least once and in order; states that need somebody to Alertmanager, as long as they last.

Nothing here may hold up the loop that guards a candidate: each receiver has a thread of its own, and the loop only hands over the
status that it has written. See ADR 14 for where the memory of what was sent lives.
"""
