package e2b

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

const (
	uploadLife = time.Hour // of a link
	maxUpload  = 4 << 30   // bytes of one archive
)

// hashPattern is a SHA-256 in hexadecimal: how clients call the files of one
// COPY. It is used as a file name.
var hashPattern = lazy(`^[0-9a-f]{64}$`)

// uploads signs links to upload build files with. The links carry their own
// proof, since clients send them without the API key.
type uploads struct {
	key [32]byte // lives as long as this process: links are short-lived
}

func newUploads() uploads {
	var u uploads
	_, _ = rand.Read(u.key[:]) // never fails since Go 1.24
	return u
}

// sign proves the right to upload one archive until expires (Unix seconds).
func (u *uploads) sign(template, hash string, expires int64) string {
	mac := hmac.New(sha256.New, u.key[:])
	// IDs and hashes hold no line breaks.
	_, _ = io.WriteString(mac, template+"\n"+hash+"\n"+strconv.FormatInt(expires, 10))
	return hex.EncodeToString(mac.Sum(nil))
}

// verify reports whether the query of an upload proves the right to it.
func (u *uploads) verify(template, hash string, q url.Values, now time.Time) bool {
	expires, err := strconv.ParseInt(q.Get("expires"), 10, 64)
	if err != nil || expires < now.Unix() {
		return false
	}
	return hmac.Equal([]byte(q.Get("signature")), []byte(u.sign(template, hash, expires)))
}

// uploadLink tells a client where to put the files of a COPY, and whether they
// are there already.
func (a *api) uploadLink(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	hash := r.PathValue("hash")
	if !hashPattern().MatchString(hash) {
		a.reject(w, r, "the hash must be a SHA-256 in hexadecimal")
		return
	}
	t, err := a.ownTemplate(r.Context(), key.Team, r.PathValue("id"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	_, err = os.Stat(filepath.Join(a.node.FilesDir(t.ID), hash))
	expires := time.Now().Add(uploadLife).Unix()
	link := url.URL{
		Scheme: schemeOf(r), Host: r.Host, Path: "/templates/" + t.ID + "/files/" + hash + "/content",
		RawQuery: url.Values{"expires": {strconv.FormatInt(expires, 10)}, "signature": {a.uploads.sign(t.ID, hash, expires)}}.Encode(),
	}
	writeJSON(w, http.StatusCreated, struct {
		Present bool   `json:"present"`
		URL     string `json:"url"`
	}{err == nil, link.String()})
}

// schemeOf is how the client reached us, perhaps through a proxy that ends TLS.
func schemeOf(r *http.Request) string {
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		return "https"
	}
	return "http"
}

// upload stores the archive that a link was given out for.
func (a *api) upload(w http.ResponseWriter, r *http.Request) {
	template, hash := r.PathValue("id"), r.PathValue("hash")
	if !hashPattern().MatchString(hash) || !a.uploads.verify(template, hash, r.URL.Query(), time.Now()) {
		a.fail(w, r, sandbox.Errorf("e2b.upload", sandbox.Denied, "", "the link is not valid or has expired"))
		return
	}
	if _, err := a.node.GetTemplate(r.Context(), template); err != nil {
		a.fail(w, r, err)
		return
	}
	if err := storeUpload(a.node.FilesDir(template), hash, http.MaxBytesReader(w, r.Body, maxUpload)); err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			writeJSON(w, http.StatusRequestEntityTooLarge, apiError{Code: http.StatusRequestEntityTooLarge, Message: "the archive is larger than 4 GiB"})
			return
		}
		a.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusOK)
}

// storeUpload writes a file that appears at once and complete, or not at all.
func storeUpload(dir, name string, body io.Reader) error {
	const op = "e2b.upload"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return sandbox.E(op, sandbox.Internal, name, err)
	}
	part, err := os.CreateTemp(dir, ".upload-*")
	if err != nil {
		return sandbox.E(op, sandbox.Internal, name, err)
	}
	_, err = io.Copy(part, body)
	if err == nil {
		err = part.Sync()
	}
	err = cmp.Or(err, part.Close())
	if err == nil {
		err = os.Rename(part.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		_ = os.Remove(part.Name())
		return sandbox.E(op, "", name, err)
	}
	return nil
}
