-- The tables of the demo: 1,000 users and 500 books, the same on every run.

CREATE TABLE users (
    id serial PRIMARY KEY,
    name text NOT NULL,
    email text,
    age int,
    created_at timestamptz NOT NULL DEFAULT now(),
    bio text
);

CREATE TABLE books (
    id serial PRIMARY KEY,
    title text NOT NULL,
    author text,
    price numeric(10, 2),
    published date,
    in_stock boolean NOT NULL DEFAULT true
);

INSERT INTO users (name, email, age, created_at, bio)
SELECT 'User ' || i,
       CASE WHEN i % 10 <> 0 THEN 'user' || i || '@example.com' END,
       CASE WHEN i % 7 <> 0 THEN 18 + i % 60 END,
       timestamptz '2024-01-01 00:00:00+00' + i * interval '1 minute',
       'Reads, writes and waits for the tide ' || i % 97
FROM generate_series(1, 1000) AS i;

INSERT INTO books (title, author, price, published, in_stock)
SELECT 'Book ' || i,
       'Author ' || i % 50,
       (5 + i % 40) + 0.99,
       date '1990-01-01' + (i * 17) % 12000,
       i % 5 <> 0
FROM generate_series(1, 500) AS i;
