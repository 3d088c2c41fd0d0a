package wire

import (
	"testing"
	"unicode/utf8"
)

func FuzzNames(f *testing.F) {
	f.Add("plain")
	f.Add("latin1 \xe9")
	f.Add("\U0010FE41 \U0010FEFF \U0010FF00")
	f.Add("\xf4\x8f\xb8")
	f.Fuzz(func(t *testing.T, name string) {
		text := EncodeName(name)
		if !utf8.ValidString(text) {
			t.Fatalf("%q becomes %q, which is not UTF-8", name, text)
		}
		if back := DecodeName(text); back != name {
			t.Fatalf("%q becomes %q and then %q", name, text, back)
		}
	})
}

func FuzzSignature(f *testing.F) {
	f.Add("v1_x", "", "/p", "user")
	f.Add(Sign("token", "/p", OpRead, "user", 100), "100", "/p", "user")
	f.Add(Sign("token", "/p", OpRead, "", 0), "", "/p", "")
	f.Fuzz(func(t *testing.T, value, expires, path, user string) {
		s := Signature{Value: value, Expires: expires}
		if s.Verify("token", path, OpRead, user, 50) != "" {
			return
		}
		// Whatever is accepted must be exactly what Sign makes.
		if s.Verify("token", path, OpWrite, user, 50) == "" || s.Verify("other", path, OpRead, user, 50) == "" {
			t.Fatalf("%+v is good for more than it was made for", s)
		}
		if expires != "" && s.Verify("token", path, OpRead, user, 1<<62) == "" {
			t.Fatalf("%+v never expires", s)
		}
	})
}
