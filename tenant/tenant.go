// Package tenant knows who may ask: teams and their API keys.
package tenant

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// DefaultTeam owns what is made on a node's own behalf and by its first key.
const DefaultTeam = "default"

// RootKey is the name of the key that a node makes for itself at its first start.
// It may do everything; no other key is called so.
const RootKey = "root"

// keyPrefix is what E2B's clients expect of a key, followed by hexadecimal digits.
const keyPrefix = "e2b_"

// Key is an API key as the node keeps it: never the secret itself, only its
// SHA-256. Keys are 160 random bits, so a slow password hash would add cost and
// no safety.
type Key struct {
	ID      string    `json:"id"`
	Team    string    `json:"team"`
	Name    string    `json:"name"`
	Hint    string    `json:"hint"` // the first characters of the key, for a person to recognise it
	Created time.Time `json:"created"`
}

// Keys is the set of API keys, kept in a database.
type Keys struct {
	db *sql.DB

	mu     sync.RWMutex
	byHash map[string]Key // hex SHA-256 of the key; what is in the database
}

// OpenKeys loads the keys from db, which it does not close.
func OpenKeys(ctx context.Context, db *sql.DB) (*Keys, error) {
	const op = "tenant.OpenKeys"
	if _, err := db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS keys (
		hash TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, team TEXT NOT NULL, name TEXT NOT NULL,
		hint TEXT NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID`); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	rows, err := db.QueryContext(ctx, `SELECT hash, id, team, name, hint, created FROM keys`)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	defer rows.Close()
	k := &Keys{db: db, byHash: make(map[string]Key)}
	for rows.Next() {
		var hash string
		var key Key
		var created int64 // Unix seconds
		if err := rows.Scan(&hash, &key.ID, &key.Team, &key.Name, &key.Hint, &created); err != nil {
			return nil, sandbox.E(op, sandbox.Internal, "", err)
		}
		key.Created = time.Unix(created, 0).UTC()
		k.byHash[hash] = key
	}
	if err := rows.Err(); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	return k, nil
}

// Create makes a key for a team. The secret is returned once and kept nowhere.
func (k *Keys) Create(ctx context.Context, team, name string) (secret string, key Key, err error) {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	secret = keyPrefix + hex.EncodeToString(b[:])
	key, err = k.Add(ctx, secret, team, name)
	return secret, key, err
}

// Add registers a secret made elsewhere, as the root key in a credentials file.
// Adding one that is there already changes nothing.
func (k *Keys) Add(ctx context.Context, secret, team, name string) (Key, error) {
	const op = "tenant.Add"
	if !strings.HasPrefix(secret, keyPrefix) || len(secret) < len(keyPrefix)+32 {
		return Key{}, sandbox.Errorf(op, sandbox.Invalid, name, "a key is %s followed by at least 32 hexadecimal digits", keyPrefix)
	}
	if team == "" {
		team = DefaultTeam
	}
	hash := hashOf(secret)
	k.mu.Lock()
	defer k.mu.Unlock()
	if old, ok := k.byHash[hash]; ok {
		return old, nil
	}
	key := Key{ID: sandbox.NewID(), Team: team, Name: name, Hint: secret[:len(keyPrefix)+4], Created: time.Now().UTC().Truncate(time.Second)}
	if _, err := k.db.ExecContext(ctx, `INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)`,
		hash, key.ID, key.Team, key.Name, key.Hint, key.Created.Unix()); err != nil {
		return Key{}, sandbox.E(op, sandbox.Internal, name, err)
	}
	k.byHash[hash] = key
	return key, nil
}

// Headers by which a node that passes a request on says for whom. They count between nodes that trust each other only.
const (
	headerTeam = "Atoll-Key-Team"
	headerName = "Atoll-Key-Name"
)

// Forward notes a key that was verified in the header of a request to another node, instead of its secret.
func (k Key) Forward(h http.Header) {
	h.Del("X-API-Key")
	h.Del("Authorization")
	h.Set(headerTeam, k.Team)
	h.Set(headerName, k.Name)
}

// Forwarded returns the key that another node has verified.
func Forwarded(h http.Header) Key {
	return Key{Team: h.Get(headerTeam), Name: h.Get(headerName)}
}

// verifiedKey is under which a context holds a key that was verified.
type verifiedKey struct{}

// Verified returns a context in which Verify answers with key, whatever the secret: for requests that another node passes on,
// which has verified it.
func Verified(ctx context.Context, key Key) context.Context {
	return context.WithValue(ctx, verifiedKey{}, key)
}

// Verify returns the key whose secret this is, or Denied. The look-up is by
// hash, so its timing tells nothing about the secret.
func (k *Keys) Verify(ctx context.Context, secret string) (Key, error) {
	if key, ok := ctx.Value(verifiedKey{}).(Key); ok {
		return key, nil
	}
	k.mu.RLock()
	defer k.mu.RUnlock()
	key, ok := k.byHash[hashOf(secret)]
	if !ok {
		return Key{}, sandbox.Errorf("tenant.Verify", sandbox.Denied, "", "the API key is not known here").
			WithHint("make one with `atoll key create`")
	}
	return key, nil
}

// List returns all keys, oldest first.
func (k *Keys) List(context.Context) []Key {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return slices.SortedFunc(maps.Values(k.byHash), func(a, b Key) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
}

// Revoke removes the key with the given ID or name; it is refused from then on.
func (k *Keys) Revoke(ctx context.Context, ref string) error {
	const op = "tenant.Revoke"
	k.mu.Lock()
	defer k.mu.Unlock()
	var found []string
	for hash, key := range k.byHash {
		if key.ID == ref || key.Name == ref && ref != "" {
			found = append(found, hash)
		}
	}
	switch len(found) {
	case 0:
		return sandbox.Errorf(op, sandbox.NotFound, ref, "no such key")
	case 1:
	default:
		return sandbox.Errorf(op, sandbox.Conflict, ref, "%d keys have this name", len(found)).WithHint("name the key by its id, see `atoll key ls`")
	}
	if _, err := k.db.ExecContext(ctx, `DELETE FROM keys WHERE hash = ?`, found[0]); err != nil {
		return sandbox.E(op, sandbox.Internal, ref, err)
	}
	delete(k.byHash, found[0])
	return nil
}

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
