"""The SQL store, a noun a file. `service.adapters.sql_store.SqlStore` puts them together."""
