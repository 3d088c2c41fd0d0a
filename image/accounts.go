package image

import (
	"io"
	"strconv"
	"strings"
)

// maxAccounts bounds what is read of a passwd or group file, in bytes.
const maxAccounts = 1 << 20

// owner resolves "user" or "user:group", names or numbers, with the tree's own
// accounts.
func (t *tree) owner(text string) (uid, gid uint32, err error) {
	user, group, hasGroup := strings.Cut(text, ":")
	fields, err := t.account("/etc/passwd", user)
	if err != nil {
		return 0, 0, err
	}
	if uid, err = number(user, fields, 2); err != nil {
		return 0, 0, err
	}
	if !hasGroup {
		if len(fields) > 3 {
			gid, err = number("", fields, 3)
			return uid, gid, err
		}
		return uid, uid, nil
	}
	if fields, err = t.account("/etc/group", group); err != nil {
		return 0, 0, err
	}
	gid, err = number(group, fields, 2)
	return uid, gid, err
}

// number is a field of an account, or the name itself when it is a number.
func number(name string, fields []string, field int) (uint32, error) {
	text := name
	if len(fields) > field {
		text = fields[field]
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, invalid("there is no user or group %q in the image", name)
	}
	return uint32(n), nil
}

// account returns the line of an account; nil when there is none.
func (t *tree) account(file, name string) ([]string, error) {
	n, err := t.follow(file)
	if err != nil || n.data == nil {
		return nil, nil // an image without accounts knows numbers only
	}
	text, err := io.ReadAll(io.NewSectionReader(n.data, 0, min(n.data.Size(), maxAccounts)))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Split(strings.TrimSpace(line), ":"); len(fields) > 2 && fields[0] == name {
			return fields, nil
		}
	}
	return nil, nil
}
