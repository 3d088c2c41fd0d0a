package wire

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"strconv"
	"strings"
)

// The operations that a file URL can be signed for.
const (
	OpRead  = "read"
	OpWrite = "write"
)

// Sign makes the signature of a file URL. User is empty for the default user;
// expires is in Unix seconds, 0 for a URL that never expires.
func Sign(token, path, op, user string, expires int64) string {
	parts := []string{path, op, user, token}
	if expires != 0 {
		parts = append(parts, strconv.FormatInt(expires, 10))
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, ":")))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Signature is how a signed file URL proves itself.
type Signature struct {
	Value   string
	Expires string // decimal Unix seconds; empty: never
}

// Verify reports why the signature does not allow op on path at the time now
// (Unix seconds), or "" when it does.
func (s Signature) Verify(token, path, op, user string, now int64) string {
	var expires int64
	if s.Expires != "" {
		var err error
		// Zero would be signed like a URL without expiry: refuse it.
		if expires, err = strconv.ParseInt(s.Expires, 10, 64); err != nil || expires <= 0 {
			return "signature_expiration must be Unix seconds"
		}
	}
	if s.Value == "" {
		return "missing signature or access token"
	}
	// Clients differ in whether they keep base64's padding.
	got := strings.TrimRight(s.Value, "=")
	if subtle.ConstantTimeCompare([]byte(got), []byte(Sign(token, path, op, user, expires))) != 1 {
		return "invalid signature"
	}
	if expires != 0 && expires < now {
		return "signature is already expired"
	}
	return ""
}
