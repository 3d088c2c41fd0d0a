package e2b

import (
	"net/http"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// signedFor finds the sandbox of a signed file URL that names none. An SDK that
// is told one URL for all sandboxes (E2B_SANDBOX_URL) makes such URLs: plain
// links have no headers. The signature itself says whose it is, since only one
// sandbox's token can have made it. The guest verifies it again and knows about
// expiry; here it only chooses the guest to ask.
func (a *api) signedFor(r *http.Request) (string, bool) {
	q := r.URL.Query()
	if r.URL.Path != "/files" || q.Get("signature") == "" {
		return "", false
	}
	all, err := a.node.List(r.Context(), node.Filter{All: true})
	if err != nil {
		return "", false
	}
	for _, sb := range all {
		if sb.GuestToken == "" || sb.State != sandbox.Running && sb.State != sandbox.Paused && sb.Moved == "" {
			continue
		}
		// At the moment zero nothing has expired yet.
		if checkSignature(sb, r, 0) == "" {
			return sb.ID, true
		}
	}
	return "", false
}

// checkSignature reports why the signature of a file URL is not good for the
// sandbox at the time now (Unix seconds), or "" when it is.
func checkSignature(sb node.Sandbox, r *http.Request, now int64) string {
	q := r.URL.Query()
	op := wire.OpRead
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		op = wire.OpWrite
	}
	v := wire.Signature{Value: q.Get("signature"), Expires: q.Get("signature_expiration")}
	return v.Verify(sb.GuestToken, q.Get("path"), op, q.Get("username"), now)
}
