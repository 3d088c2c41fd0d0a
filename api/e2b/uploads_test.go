package e2b

import (
	"net/url"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func link(u *uploads, template, hash string, expires int64) url.Values {
	return url.Values{"expires": {strconv.FormatInt(expires, 10)}, "signature": {u.sign(template, hash, expires)}}
}

func TestAnUploadLinkIsGoodForOneArchiveAndOneHour(t *testing.T) {
	u, other := newUploads(), newUploads()
	now := time.Unix(1_000_000, 0)
	q := link(&u, "tpl", "hash", now.Unix()+60)
	if !u.verify("tpl", "hash", q, now) {
		t.Error("a fresh link is refused")
	}
	if u.verify("tpl2", "hash", q, now) || u.verify("tpl", "hash2", q, now) {
		t.Error("the link is good for other archives")
	}
	if u.verify("tpl", "hash", q, now.Add(2*time.Minute)) {
		t.Error("an expired link is accepted")
	}
	if other.verify("tpl", "hash", q, now) {
		t.Error("a link of another key is accepted")
	}
	q.Set("expires", strconv.FormatInt(now.Unix()+3600, 10))
	if u.verify("tpl", "hash", q, now) {
		t.Error("a link whose life was prolonged is accepted")
	}
}

func FuzzUploadLink(f *testing.F) {
	u := newUploads()
	f.Add("expires=99999999999&signature=00", "abc")
	f.Fuzz(func(t *testing.T, query, hash string) {
		q, err := url.ParseQuery(query)
		if err == nil && u.verify("tpl", hash, q, time.Unix(0, 0)) {
			t.Fatalf("%q was accepted", query)
		}
		if hashPattern().MatchString(hash) && filepath.Base(hash) != hash {
			t.Fatalf("hash %q is not a file name", hash)
		}
	})
}
