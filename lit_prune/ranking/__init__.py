"""Ranking: criteria, the group table, and the selection of groups under a budget."""
