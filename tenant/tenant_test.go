package tenant

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	_ "modernc.org/sqlite" // the driver

	"github.com/atoll-run/atoll/sandbox"
)

func openDB(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func openKeys(t *testing.T, db *sql.DB) *Keys {
	t.Helper()
	k, err := OpenKeys(context.Background(), db)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// conformance: S1
func TestAKeyIsKnownAfterReopeningAndIsStoredOnlyAsAHash(t *testing.T) {
	ctx := context.Background()
	db := openDB(t, filepath.Join(t.TempDir(), "keys.db"))
	secret, made, err := openKeys(t, db).Create(ctx, "blue", "ci")
	if err != nil {
		t.Fatal(err)
	}
	got, err := openKeys(t, db).Verify(ctx, secret)
	if err != nil || got != made || got.Team != "blue" {
		t.Fatalf("got %+v, want %+v, %v", got, made, err)
	}
	rows, err := db.Query(`SELECT hash || id || team || name || hint FROM keys`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var all string
		if err := rows.Scan(&all); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(all, secret) {
			t.Fatal("the database holds the secret itself")
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
}

func TestUnknownAndRevokedKeysAreDenied(t *testing.T) {
	ctx := context.Background()
	k := openKeys(t, openDB(t, filepath.Join(t.TempDir(), "keys.db")))
	secret, key, err := k.Create(ctx, "", "old")
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{"", "e2b_", secret + "0", secret[:len(secret)-1]} {
		if _, err := k.Verify(ctx, wrong); !sandbox.Is(err, sandbox.Denied) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	if err := k.Revoke(ctx, key.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Verify(ctx, secret); !sandbox.Is(err, sandbox.Denied) {
		t.Errorf("a revoked key: %v", err)
	}
	if err := k.Revoke(ctx, key.ID); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("revoking twice: %v", err)
	}
}

func TestAddingTheSameSecretTwiceMakesOneKey(t *testing.T) {
	ctx := context.Background()
	k := openKeys(t, openDB(t, filepath.Join(t.TempDir(), "keys.db")))
	secret := keyPrefix + strings.Repeat("ab", 20)
	a, err := k.Add(ctx, secret, DefaultTeam, "root")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := k.Add(ctx, secret, DefaultTeam, "root"); err != nil || a != b || len(k.List(ctx)) != 1 {
		t.Fatalf("%+v and %+v, %v", a, b, err)
	}
	if _, err := k.Add(ctx, "short", "", ""); !sandbox.Is(err, sandbox.Invalid) {
		t.Fatalf("a short key: %v", err)
	}
}
