package node

import (
	"context"
	"database/sql"
	"encoding/json"

	"github.com/atoll-run/atoll/sandbox"
)

// The kinds of record.
const (
	kindSandbox  = "sandbox"
	kindTemplate = "template"
	kindVolume   = "volume"
	kindPool     = "pool"
)

// store keeps records as JSON documents in SQLite. A put that returned has
// reached the disk; memory is never ahead of it.
type store struct{ db *sql.DB }

func openStore(ctx context.Context, db *sql.DB) (*store, error) {
	_, err := db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS records (
		kind TEXT NOT NULL, id TEXT NOT NULL, doc BLOB NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID`)
	if err != nil {
		return nil, sandbox.E("node.Open", sandbox.Internal, "records", err)
	}
	return &store{db}, nil
}

func (s *store) put(ctx context.Context, kind, id string, v any) error {
	doc, err := json.Marshal(v)
	if err == nil {
		// A write must not be torn by a caller who gives up: intent that was
		// half recorded could not be reconciled.
		_, err = s.db.ExecContext(context.WithoutCancel(ctx),
			`INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (kind, id) DO UPDATE SET doc = excluded.doc`, kind, id, doc)
	}
	if err != nil {
		return sandbox.E("node.put", sandbox.Unavailable, id, err).WithHint("is the disk of the state directory full?")
	}
	return nil
}

func (s *store) delete(ctx context.Context, kind, id string) error {
	if _, err := s.db.ExecContext(context.WithoutCancel(ctx), `DELETE FROM records WHERE kind = ? AND id = ?`, kind, id); err != nil {
		return sandbox.E("node.delete", sandbox.Unavailable, id, err)
	}
	return nil
}

// load calls fn with every record of a kind.
func load[T any](ctx context.Context, s *store, kind string, fn func(id string, v T)) error {
	const op = "node.load"
	rows, err := s.db.QueryContext(ctx, `SELECT id, doc FROM records WHERE kind = ?`, kind)
	if err != nil {
		return sandbox.E(op, sandbox.Internal, kind, err)
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		var doc []byte
		if err := rows.Scan(&id, &doc); err != nil {
			return sandbox.E(op, sandbox.Internal, kind, err)
		}
		var v T
		if err := json.Unmarshal(doc, &v); err != nil {
			return sandbox.E(op, sandbox.Internal, kind+" "+id, err)
		}
		fn(id, v)
	}
	if err := rows.Err(); err != nil {
		return sandbox.E(op, sandbox.Internal, kind, err)
	}
	return nil
}
