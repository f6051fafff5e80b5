"""The language both sides speak: pure rules and frozen values. It knows no framework, no database and no subprocess."""
