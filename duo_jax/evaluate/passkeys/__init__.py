"""Passkey retrieval: several passkeys, hidden in one text and all asked for."""
