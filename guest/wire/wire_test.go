package wire

import (
	"bytes"
	"net/netip"
	"reflect"
	"testing"
	"time"
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

// FuzzMachine has any bytes be a machine's identity, and writes what was read again.
func FuzzMachine(f *testing.F) {
	whole := Machine{
		Time: time.Unix(0, 1234567890123456789), Entropy: []byte("seed"), Hostname: "name", Pids: 7, Rest: true,
		Network: &MachineNetwork{
			MAC: "52:54:00:12:34:99", MTU: 1400, Address: netip.MustParsePrefix("10.1.2.3/24"),
			Gateway: netip.MustParseAddr("10.1.2.1"), Resolver: netip.MustParseAddr("10.1.2.2"),
		},
	}
	data, err := whole.AppendBinary(nil)
	if err != nil {
		f.Fatal(err)
	}
	if back, err := ParseMachine(data); err != nil || !reflect.DeepEqual(back, whole) {
		f.Fatalf("%+v becomes %+v, %v", whole, back, err)
	}
	f.Add(data)
	if data, err = (Machine{}).AppendBinary(nil); err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseMachine(data)
		if err != nil {
			return
		}
		again, err := m.AppendBinary(nil)
		if err != nil {
			return // longer than what is ever written
		}
		if back, err := ParseMachine(again); err != nil || m.Network != nil && !bytes.Equal(again, data) || back.Hostname != m.Hostname {
			t.Fatalf("%x becomes %x, %v", data, again, err)
		}
	})
}
